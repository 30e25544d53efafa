"""The target row of each unsafe prompt: its most distant codebook row (paper, section 4.1)."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from des.models.encoders import TextEncoder
from des.models.loading import read_pt
from des.training.codebook import Codebook, dependencies, rounding_inputs
from des.utils.errors import UserError
from des.utils.files import replacing, sha256_tensors
from des.utils.locks import locked
from des.utils.logs import logger, progress
from des.utils.resume import PartialFile, differing

import psutil
import torch
from torch import Tensor

_CPU_BYTES = 2 * 2**30  # at most for queries on a CPU, where a container may have less memory than the machine says


def find_targets(
    path: Path,
    codebook: Codebook,
    encoder: TextEncoder,
    unsafe: list[str],
    batch_size: int = 32,
    recompute: bool = False,
    choice: str = "lowest",
    seed: int = 42,
) -> Tensor:
    """The codebook row of each unsafe prompt's target, [unsafe], saved in `path` with the hashes that it depends on.

    `choice` is one of TARGETS: the most distant row (the paper's), the nearest one, or a random one drawn from `seed` (ablations).
    An interrupted search resumes after the last group of prompts in `{path}.part`. Raises UserError if `path` is another kind of
    file or was made from other inputs, unless `recompute` is set, and while another process writes it.
    """
    hashes = dependencies(encoder, unsafe) | {"codebook": codebook.hashes["rows"]}
    if choice != "lowest":
        hashes["choice of targets"] = f"random, seed {seed}" if choice == "random" else choice
    if path.exists() and not recompute:
        return _read_targets(path, hashes, len(codebook))
    with locked(path.with_name(f".{path.name}.lock"), f"the targets {path.name}"):
        if choice == "random":
            indices = torch.randint(len(codebook), (len(unsafe),), generator=torch.Generator().manual_seed(seed))
        else:
            part = PartialFile(path, hashes | rounding_inputs(encoder, batch_size))
            indices = _search(part, codebook, encoder, unsafe, batch_size, nearest=choice == "highest")
        with replacing(path) as temporary:
            torch.save({"indices": indices, "hashes": hashes, "sha256": sha256_tensors({"indices": indices})}, temporary)
        if choice != "random":
            part.discard()
    return indices


def _search(
    part: PartialFile, codebook: Codebook, encoder: TextEncoder, unsafe: list[str], batch_size: int, nearest: bool
) -> Tensor:
    """Search the target rows [unsafe], and write them to `part` group by group."""
    if part.rows:
        logger.info("%d of %d targets are found already; resuming after them", part.rows, len(unsafe))
    with progress(None, desc="targets", total=len(unsafe), initial=part.rows, unit="prompt") as bar:
        for queries in _grouped(encoder.encode(unsafe[part.rows :], batch_size)):
            found = codebook.farthest(queries, nearest)[1].cpu()
            part.append(found.numpy().tobytes(), len(found))
            bar.update(len(found))
    return torch.frombuffer(bytearray(part.read()), dtype=torch.long)


def query_bytes(device: torch.device) -> int:
    """Bytes of queries in fp32 to hold for each pass over the codebook: a quarter of the device's free memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    return min(psutil.virtual_memory().available // 4, _CPU_BYTES) if device.type == "cpu" else 0


def _grouped(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Join batches up to `query_bytes`, so that the search needs fewer passes over the codebook; one batch at least."""
    group: list[Tensor] = []
    room = 0
    for batch in batches:
        room = room if group else query_bytes(batch.device)
        group.append(batch)
        if (len(group) + 1) * batch.numel() * 4 > room:
            yield torch.cat(group)
            group = []
    if group:
        yield torch.cat(group)


def _read_targets(path: Path, hashes: dict[str, str], rows: int) -> Tensor:
    """Read the targets in `path`. Raises UserError if they were made from other inputs, or were changed since."""
    again = "pass --recompute_targets or name another --safe_embedding_path"
    content = read_pt(path)
    whole = isinstance(content, dict) and {"indices", "hashes", "sha256"} <= content.keys()
    if not whole or not isinstance(content["indices"], Tensor) or not isinstance(content["hashes"], dict):
        raise UserError(f"{path} holds no targets that this version can read; {again}")
    indices, made_from = content["indices"], content["hashes"]
    changed = differing(made_from, hashes)
    if changed:
        raise UserError(f"{path} is stale, since these inputs of it have changed: {', '.join(changed)}; {again}")
    if content["sha256"] != sha256_tensors({"indices": indices}) or not ((indices >= 0) & (indices < rows)).all():
        raise UserError(f"{path} was changed since it was written; {again}")
    return indices
