import hashlib
from pathlib import Path


def root_of(path: Path) -> bytes:
    digests = []
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digests.append(hashlib.sha256(piece).digest())
        size = file.tell()
    return hashlib.sha256(b"raceme-file:" + size.to_bytes(8, "big") + b"".join(digests)).digest()
