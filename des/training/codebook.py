"""The codebook of safe embeddings (paper, section 4.1): written in bounded memory, memory-mapped, searched block by block."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from des.data.truncation import truncated_rows
from des.models.encoders import TextEncoder, per_encoder_name
from des.utils.errors import UserError, not_found
from des.utils.files import check_room, sha256_file, sha256_tensors, sha256_texts, write_json
from des.utils.locks import locked
from des.utils.logs import logger
from des.utils.resume import PartialFile, differing

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {"fp32": (torch.float32, "F32"), "fp16": (torch.float16, "F16"), "bf16": (torch.bfloat16, "BF16")}
SHARD_BYTES = 4 * 10**9
_BLOCK_BYTES = 32 * 2**20  # codebook rows, in fp32, that the search holds at a time
_QUERIES = 32  # in a matrix product, whose shape decides the last bits; their total number does not


def dtype_name(encoder: TextEncoder) -> str:
    """The name in DTYPES of the encoder's dtype, in which its embeddings are stored without rounding."""
    return next(name for name, (dtype, _) in DTYPES.items() if dtype == encoder.model.dtype)


def codebook_folder(folder: Path, model_path: str, index: int) -> Path:
    """The folder of one text encoder's codebook: `folder`, or `{folder}_encoder{i}` for a pipeline with several encoders."""
    return folder.with_name(per_encoder_name(model_path, index, folder.name, "{stem}_encoder{i}"))


def find_codebook(folder: Path, model_path: str, index: int, check_files: bool = True) -> "Codebook":
    """Open the `codebook_folder` of a text encoder, or `folder` if only that exists. Raises UserError if neither does."""
    numbered = codebook_folder(folder, model_path, index)
    if numbered != folder and not numbered.is_dir() and not folder.is_dir():
        raise UserError(
            f"there is no codebook for text encoder {index}: neither {numbered} nor {folder} exists; "
            f"run save_codebook.py --encoder_idx {index}"
        )
    return Codebook(numbered if numbered.is_dir() else folder, check_files)


def write_codebook(
    folder: Path,
    encoder: TextEncoder,
    prompts: list[str],
    dtype: str | None = None,
    batch_size: int = 64,
    made_by: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the rows ([rows, tokens, hidden], row i = E(prompt i)) and `codebook.json` into `folder`.

    Rows go to `codebook.safetensors`, or to several files (shards) of at most `shard_bytes`, in the type `dtype` (default: the
    encoder's). Memory holds one batch. A call with the same arguments resumes an interrupted one after its last batch.
    Raises UserError for an embedding that is not finite or overflows `dtype`, and while another process writes into `folder`.
    """
    dtype = dtype or dtype_name(encoder)
    tokens, hidden = encoder.shape()
    shard_rows = max(1, shard_bytes // (tokens * hidden * DTYPES[dtype][0].itemsize))
    with locked(folder / ".lock", "a codebook"):
        # An earlier codebook stays whole until all new rows are in `.part` files. Then the rows take their names, and codebook.json,
        # which holds their hashes, comes last: a crash in between leaves a codebook that is refused, and the records of the finished
        # shards, from which the next call completes it.
        _warn_if_replaced(folder, prompts)
        parts = _open_parts(folder, encoder, prompts, dtype, batch_size, shard_rows)
        _write_rows(parts, encoder, prompts, dtype, batch_size, shard_rows)
        shards = [{"file": part.path.name, "rows": part.rows, "sha256": part.finish()} for part in parts]
        hashes = dependencies(encoder, prompts) | {"rows": sha256_texts(shard["sha256"] for shard in shards)}
        facts = {"model": encoder.model_path, "encoder": encoder.index, "subfolder": encoder.subfolder}
        facts |= {"dtype": dtype, "rows": len(prompts), "tokens": tokens, "hidden": hidden, "shards": shards}
        facts["truncated_prompts"] = len(truncated_rows(encoder.tokenizer, prompts, encoder.length))
        write_json(folder / "codebook.json", {**facts, "hashes": hashes, "made_by": made_by, "prompts": prompts})
        _remove_others(folder, parts)
    message = "%d of %d prompts of the codebook are longer than %d tokens, and are truncated"
    logger.info(message, facts["truncated_prompts"], len(prompts), encoder.length)


def _warn_if_replaced(folder: Path, prompts: list[str]) -> None:
    """Log a warning if the folder holds the codebook of another prompt list."""
    try:
        earlier = json.loads((folder / "codebook.json").read_text(encoding="utf-8"))["prompts"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if earlier != prompts:
        logger.warning("the codebook in %s, of %d other prompts, is replaced by one of %d", folder, len(earlier), len(prompts))


def _open_parts(
    folder: Path, encoder: TextEncoder, prompts: list[str], dtype: str, batch_size: int, shard_rows: int
) -> list[PartialFile]:
    """The partial files of a codebook's shards, of `shard_rows` rows each but the last, resumed if an interrupted run left them."""
    (torch_dtype, code), shape = DTYPES[dtype], encoder.shape()
    counts = [len(prompts[start : start + shard_rows]) for start in range(0, len(prompts), shard_rows)]
    numbered = [f"codebook-{number:05d}-of-{len(counts):05d}.safetensors" for number in range(1, len(counts) + 1)]
    names = numbered if len(counts) > 1 else ["codebook.safetensors"]
    made_from = dependencies(encoder, prompts) | {"dtype": dtype, "rows in a file": str(shard_rows)}
    made_from |= rounding_inputs(encoder, batch_size)
    parts: list[PartialFile] = []
    for name, count in zip(names, counts, strict=True):
        header = _safetensors_header("embeddings", code, (count, *shape), torch_dtype.itemsize)
        part = PartialFile(folder / name, made_from, header)
        if part.rows and parts and parts[-1].rows < shard_rows:  # rows are written in order, and an earlier shard was lost
            part.discard()
            part = PartialFile(folder / name, made_from, header)
        parts.append(part)
    check_room(folder / names[0], len(prompts) * math.prod(shape) * torch_dtype.itemsize - sum(part.size for part in parts))
    return parts


def _remove_others(folder: Path, parts: list[PartialFile]) -> None:
    """Remove the records of a finished codebook's partial files, and the files of earlier codebooks with other shards."""
    for part in parts:
        part.forget()
    names = {part.path.name for part in parts}
    for file in folder.glob("codebook*.safetensors*"):
        if file.name not in names and re.fullmatch(r"codebook(-\d{5}-of-\d{5})?\.safetensors(\.part(\.json)?)?", file.name):
            file.unlink()


def rounding_inputs(encoder: TextEncoder, batch_size: int) -> dict[str, str]:
    """What rounding in embeddings depends on, besides `dependencies`; an interrupted file is resumed only if these are equal too."""
    return {"batch size": str(batch_size), "device": encoder.device.type, "torch": str(torch.__version__)}


def _write_rows(
    parts: list[PartialFile], encoder: TextEncoder, prompts: list[str], dtype: str, batch_size: int, shard_rows: int
) -> None:
    """Encode the prompts whose rows are missing from the parts, and append the rows batch by batch."""
    done = sum(part.rows for part in parts)
    if done:
        logger.info("%d of %d rows of the codebook are written already; resuming after them", done, len(prompts))
    # A row's last bits depend on the batch that it is encoded in. So encoding resumes at the start of a batch, and the rows of
    # that batch which are written already are skipped.
    skip = done % batch_size
    rest = prompts[done - skip :] if done < len(prompts) else []
    for batch in encoder.encode(rest, batch_size, desc="codebook"):
        if not batch.isfinite().all():
            _give_up(parts, "an embedding is not finite; no codebook was written")
        cast = batch[skip:].to(DTYPES[dtype][0]).cpu().contiguous()
        if not cast.isfinite().all():
            _give_up(parts, f"an embedding overflows {dtype}; use --dtype bf16 or fp32")
        while len(cast):
            part = parts[done // shard_rows]
            rows, cast = cast.tensor_split([shard_rows - part.rows])
            part.append(memoryview(rows.reshape(-1).view(torch.uint8).numpy()), len(rows))
            done += len(rows)
        skip = 0


def _give_up(parts: list[PartialFile], why: str) -> NoReturn:
    for part in parts:
        part.discard()
    raise UserError(why)


def _safetensors_header(name: str, code: str, shape: Sequence[int], itemsize: int) -> bytes:
    """The header of a safetensors file with one tensor, whose data can then be appended batch by batch."""
    size = itemsize * shape[0] * shape[1] * shape[2]
    header = json.dumps({name: {"dtype": code, "shape": list(shape), "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def dependencies(encoder: TextEncoder, prompts: list[str]) -> dict[str, str]:
    """What the embeddings depend on: hashes of encoder, prompts and tokens, the sequence length, and the output that is read."""
    return {
        "encoder": encoder.base_sha256,
        "encoder configuration": encoder.identity["config"],
        "embedding": encoder.embedding + ", with attention mask" * encoder.masked_by_config,
        "sequence length": str(encoder.length),
        "prompts": sha256_texts(prompts),
        "tokenizer": sha256_tensors({"input_ids": encoder.tokenize(prompts)}),
    }


class Codebook:
    """A codebook on disk, whose rows are memory-mapped."""

    def __init__(self, folder: Path, check_files: bool = True):
        """Open the codebook in `folder`. Raises UserError if it is missing, incomplete, or was changed since it was written.

        Without `check_files` the files, which can have tens of GB, are not hashed: one process on each machine hashes them.
        """
        try:
            self.facts: dict[str, Any] = json.loads((folder / "codebook.json").read_text(encoding="utf-8"))
            self.hashes: dict[str, str] = dict(self.facts["hashes"])
            self.prompts: list[str] = [prompt + "" for prompt in self.facts["prompts"]]  # TypeError if one is no text
            self._files = [folder / shard["file"] for shard in self.facts["shards"]]
            for path, shard in zip(self._files, self.facts["shards"], strict=True):
                if check_files and sha256_file(path) != shard["sha256"]:
                    raise UserError(f"{path} is not the file that {folder}/codebook.json describes; run save_codebook.py again")
            self._rows = [_rows_of(path) for path in self._files]
            self._per_shard = len(self._rows[0])
        except FileNotFoundError as error:
            missing = folder if not folder.is_dir() else Path(error.filename)
            raise not_found("the codebook", missing, "run save_codebook.py") from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, SafetensorError):
            raise UserError(f"{folder} holds no codebook that can be read; run save_codebook.py again") from None
        self.folder = folder
        self._norms: Tensor | None = None

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def rows(self, indices: Tensor) -> Tensor:
        """Embeddings [n, tokens, hidden] of the given rows [n], on the CPU, in the codebook's dtype."""
        return torch.stack([self._rows[row // self._per_shard][row % self._per_shard] for row in indices.tolist()])

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield all rows flattened, in blocks [n, tokens * hidden] on the CPU, each with the number of its first row.

        The file is mapped again for each block, so that a pass over all rows does not keep them in memory.
        """
        size = max(1, _BLOCK_BYTES // (4 * self._rows[0][0].numel()))
        for shard, path in enumerate(self._files):
            for start in range(0, len(self._rows[shard]), size):
                yield shard * self._per_shard + start, _rows_of(path, slice(start, start + size)).flatten(1)

    def check(self, encoder: TextEncoder) -> None:
        """Raise UserError unless these rows are `encoder`'s embeddings of their prompts."""
        now = dependencies(encoder, self.prompts)
        changed = differing({name: self.hashes[name] for name in now.keys() & self.hashes.keys()}, now)
        for name, value in now.items():
            if name in changed:
                how = f": {self.hashes.get(name)}, now {value}" if len(value) < 64 else ""
                raise UserError(
                    f"the codebook in {self.folder} was made with other inputs ({name}{how}), for {self.facts['model']}, encoder "
                    f"{self.facts['encoder']}; run save_codebook.py for {encoder.model_path}, encoder {encoder.index}"
                )

    def norms(self) -> Tensor:
        """The norm of each flattened row, [rows], in fp32: |x|^2 overflows fp16 beyond 65504."""
        if self._norms is None:
            self._norms = torch.cat([rows.float().norm(dim=1) for _, rows in self.blocks()])
        return self._norms

    def farthest(self, queries: Tensor, nearest: bool = False) -> tuple[Tensor, Tensor]:
        """For each query [n, tokens, hidden], the lowest cosine similarity to any row and that row's index, both [n].

        With `nearest`, the highest similarity instead. Of equal cosines the first one is returned. Equal rows may have cosines
        that differ in the last bit, depending on their places in the blocks, so any one of them is returned.
        """
        # One block of rows at a time goes to the queries' device; matrix products in fp32 give its similarities to all queries, of
        # which only the lowest so far and its row are kept. So memory does not grow with the codebook.
        parts = [part.float().flatten(1) * (-1 if nearest else 1) for part in queries.split(_QUERIES)]
        lengths = [part.norm(dim=1, keepdim=True) for part in parts]
        best = torch.full((len(queries),), torch.inf, device=queries.device)
        index = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
        norms = self.norms().to(queries.device)
        for start, block in self.blocks():
            rows = block.to(queries.device).float()
            of_rows = norms[start : start + len(rows)]
            cosines = [part @ rows.T / (length * of_rows) for part, length in zip(parts, lengths, strict=True)]
            lowest, which = torch.cat(cosines).min(dim=1)
            lower = lowest < best
            best, index = torch.where(lower, lowest, best), torch.where(lower, which + start, index)
        return (-best if nearest else best), index


def _rows_of(path: Path, part: slice | None = None) -> Tensor:
    """The rows [n, tokens, hidden] of one file, or a slice of them, memory-mapped."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("embeddings") if part is None else file.get_slice("embeddings")[part]
