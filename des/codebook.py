"""The codebook of safe embeddings: writing it in bounded memory, memory-mapping it, and searching its most distant rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from des.checkpoints import fingerprint
from des.cli import UserError, progress
from des.encoders import TextEncoder
from des.loading import read_pt
from des.results import replacing, sha256_file, sha256_tensors, sha256_texts, write_json

DTYPES = {"fp32": (torch.float32, "F32"), "fp16": (torch.float16, "F16"), "bf16": (torch.bfloat16, "BF16")}
EMBEDDING = "last_hidden_state"


def write_codebook(
    folder: Path, encoder: TextEncoder, prompts: list[str], dtype: str = "fp32", batch_size: int = 64, made_by: Any = None
) -> None:
    """Write `codebook.safetensors` ([rows, tokens, hidden], row i = E(prompt i)) and `codebook.json` into `folder`.

    Batches go to disk as they are made, so memory holds one of them. `codebook.json`, which names the hash of the rows, is
    written last: a codebook that was interrupted is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "codebook.json").unlink(missing_ok=True)
    torch_dtype, code = DTYPES[dtype]
    tokens, hidden = encoder.tokenizer.model_max_length, encoder.model.config.hidden_size
    shape = (len(prompts), tokens, hidden)
    with replacing(folder / "codebook.safetensors") as temporary, temporary.open("wb") as file:
        file.write(_safetensors_header("embeddings", code, shape, torch_dtype.itemsize))
        for batch in encoder.encode(prompts, batch_size, desc="codebook"):
            if batch.shape[1:] != shape[1:]:
                raise UserError(f"the encoder gave embeddings of {tuple(batch.shape[1:])}, not {shape[1:]}")
            file.write(batch.to(torch_dtype).cpu().contiguous().view(torch.uint8).numpy())
    hashes = dependencies(encoder, prompts) | {"rows": sha256_file(folder / "codebook.safetensors")}
    facts = {"model": encoder.model_path, "encoder": encoder.index, "subfolder": encoder.subfolder, "embedding": EMBEDDING}
    facts |= {"dtype": dtype, "rows": len(prompts), "tokens": tokens, "hidden": hidden, "hashes": hashes, "made_by": made_by}
    write_json(folder / "codebook.json", facts | {"prompts": prompts})


def _safetensors_header(name: str, code: str, shape: Sequence[int], itemsize: int) -> bytes:
    """The header of a safetensors file with one tensor, so that its data can be streamed after it."""
    size = itemsize * shape[0] * shape[1] * shape[2]
    header = json.dumps({name: {"dtype": code, "shape": list(shape), "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def dependencies(encoder: TextEncoder, prompts: list[str]) -> dict[str, str]:
    """Hashes of what embeddings depend on: the encoder's weights, the prompts, and the tokens they become."""
    return {
        "encoder": fingerprint(encoder.model),
        "prompts": sha256_texts(prompts),
        "tokenizer": sha256_tensors({"input_ids": encoder.tokenize(prompts)}),
    }


class Codebook:
    """A codebook on disk: its rows stay there (memory-mapped) and are read as they are asked for."""

    def __init__(self, folder: Path):
        """Open the codebook in `folder`; UserError when it is missing, incomplete, or was changed since it was written."""
        try:
            self.facts: dict[str, Any] = json.loads((folder / "codebook.json").read_text(encoding="utf-8"))
            self.hashes: dict[str, str] = self.facts["hashes"]
            self.prompts: list[str] = self.facts["prompts"]
            rows = folder / "codebook.safetensors"
            if sha256_file(rows) != self.hashes["rows"]:
                raise UserError(f"{rows} is not the file that {folder}/codebook.json describes; run save_codebook.py again")
            with safe_open(rows, framework="pt") as file:
                self._rows = file.get_tensor("embeddings")
            self._file = rows
        except FileNotFoundError as error:
            raise UserError(
                f"there is no codebook in {folder}: {Path(error.filename).name} is missing; run save_codebook.py"
            ) from None
        except (ValueError, KeyError, SafetensorError):
            raise UserError(f"{folder} holds no codebook that can be read; run save_codebook.py again") from None
        self.folder = folder
        self._norms: Tensor | None = None

    def __len__(self) -> int:
        return self._rows.shape[0]

    def rows(self, indices: Tensor | slice) -> Tensor:
        """Embeddings [n, tokens, hidden] of the given rows, on the CPU, in the codebook's dtype."""
        return self._rows[indices]

    def _block(self, start: int, stop: int) -> Tensor:
        """Rows start..stop through a mapping of their own, so that a pass over all rows does not keep them in memory."""
        with safe_open(self._file, framework="pt") as file:
            return file.get_slice("embeddings")[start:stop]

    def check(self, encoder: TextEncoder) -> None:
        """Raise UserError unless these rows are what `encoder` makes of their prompts."""
        now = dependencies(encoder, self.prompts)
        for name, value in now.items():
            if self.hashes[name] != value:
                raise UserError(
                    f"the codebook in {self.folder} was made with another {name} ({self.facts['model']}, encoder "
                    f"{self.facts['encoder']}); run save_codebook.py for {encoder.model_path}, encoder {encoder.index}"
                )

    def norms(self, block: int = 128) -> Tensor:
        """The fp32 norm of each flattened row, [rows]."""
        if self._norms is None:
            starts = range(0, len(self), block)
            self._norms = torch.cat([self._block(i, i + block).float().flatten(1).norm(dim=1) for i in starts])
        return self._norms

    def farthest(self, queries: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
        """For each query [n, tokens, hidden], the lowest cosine similarity to any row and that row's index, both [n].

        The first of equal rows wins. Works block by block through matrix products on the queries' device, in fp32.
        """
        queries = queries.float().flatten(1)
        lengths = queries.norm(dim=1, keepdim=True)
        best = queries.new_full((len(queries),), torch.inf)
        index = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
        norms = self.norms().to(queries.device)
        for start in range(0, len(self), block):
            rows = self._block(start, start + block).to(queries.device).float().flatten(1)
            lowest, which = (queries @ rows.T / (lengths * norms[start : start + block])).min(dim=1)
            closer = lowest < best
            best, index = torch.where(closer, lowest, best), torch.where(closer, which + start, index)
        return best, index


def find_targets(
    path: Path, codebook: Codebook, encoder: TextEncoder, unsafe: list[str], batch_size: int = 32, recompute: bool = False
) -> Tensor:
    """The row of the most distant safe prompt for each unsafe prompt, [unsafe], kept in `path` with the hashes it depends on.

    Raises UserError when `path` holds something else or was made from other inputs, unless `recompute`.
    """
    hashes = dependencies(encoder, unsafe) | {"codebook": codebook.hashes["rows"]}
    if path.exists() and not recompute:
        return _read_targets(path, hashes)
    found = []
    blocks = encoder.encode(unsafe, batch_size)
    for embeddings in progress(blocks, desc="targets", total=-(-len(unsafe) // batch_size), unit="batch"):
        found.append([part.cpu() for part in codebook.farthest(embeddings)])
    cosines, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    with replacing(path) as temporary:
        torch.save({"indices": indices, "cosines": cosines, "hashes": hashes}, temporary)
    return indices


def _read_targets(path: Path, hashes: dict[str, str]) -> Tensor:
    again = "pass --recompute_targets or name another --safe_embedding_path"
    content = read_pt(path)
    if not isinstance(content, dict) or not {"indices", "hashes"} <= content.keys():
        raise UserError(f"{path} holds no targets that this version can read; {again}")
    indices, made_from = content["indices"], content["hashes"]
    changed = [name for name in hashes if made_from.get(name) != hashes[name]]
    if changed:
        raise UserError(f"{path} is stale: another {' and another '.join(changed)} made it; {again}")
    return indices
