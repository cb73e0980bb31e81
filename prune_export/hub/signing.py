"""Signs the files that are published with a private key, in the form of OpenSSF's model signing.

model_signing verify key DIR --public_key public.pem --signature DIR/model.sig
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from prune_export.errors import MissingExtra, PublishError
from prune_export.system.temporary import Temporary

SIGNATURE: Final = "model.sig"


def sign(directory: Path, files: Sequence[str], key: Path) -> Path:
    """Writes `model.sig` into the directory: a signature over these files and no other.

    `key` is a private key of an elliptic curve, in PEM; it is read and goes nowhere.

    Raises:
        MissingExtra: model-signing is not installed.
        PublishError: the key cannot be read, or is of another kind.
    """
    try:
        from model_signing import hashing, signing
    except ImportError as error:
        raise MissingExtra.of("publish --sign", "model-signing", "sign") from error
    # What is not published must not be in the signature, not even its name: the files are signed
    # where nothing else is.
    with Temporary() as place:
        for name in files:
            if name != SIGNATURE:
                (place / "model" / name).parent.mkdir(parents=True, exist_ok=True)
                (place / "model" / name).symlink_to((directory / name).resolve())
        try:
            config = signing.Config().use_elliptic_key_signer(private_key=key)
            config.set_hashing_config(hashing.Config().set_allow_symlinks(True))
            config.sign(place / "model", place / SIGNATURE)
        except (OSError, ValueError, TypeError) as error:
            raise PublishError(
                f"--sign {key}",
                f"cannot sign with it: {str(error).splitlines()[0] if str(error) else error!r}",
                "make a key by `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`",
            ) from error
        shutil.copyfile(place / SIGNATURE, directory / SIGNATURE)
    return directory / SIGNATURE
