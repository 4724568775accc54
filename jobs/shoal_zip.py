"""Shoal itself as a zip, which a cluster gets with each run: `submit.py` and `remote.py` send it."""

import importlib.metadata
import py_compile
import shutil
import tempfile
import zipfile
from importlib import resources
from pathlib import Path

import shoal.conf

PACKED = {"conf": "*.y*ml", "udfs": "*.json", "jobs": "*.json"}
"""The packages of Shoal, and their files beside the Python ones."""


def pack_shoal(file: Path) -> None:
    """Shoal's own packages as a zip that Python imports from, the same bytes for the same version.

    Where this is imported from such a zip, a copy of it.
    """
    whole = Path(shoal.conf.__file__).parents[2]
    if whole.is_file():
        shutil.copyfile(whole, file)
        return
    version = importlib.metadata.version("shoal")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        # Python finds a package without __init__.py in a zip only where its folder has an entry of its own.
        archive.writestr(zipfile.ZipInfo("shoal/"), b"")
        for package, data in PACKED.items():
            archive.writestr(zipfile.ZipInfo(f"shoal/{package}/"), b"")
            with resources.as_file(resources.files(f"shoal.{package}")) as folder:
                paths = sorted({*folder.glob("*.py"), *folder.rglob(data)})
                for path in paths:
                    name = f"shoal/{package}/{path.relative_to(folder).as_posix()}"
                    archive.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_DEFLATED)
                    if path.suffix == ".py":
                        archive.writestr(zipfile.ZipInfo(f"{name}c"), _compiled(path, name), zipfile.ZIP_DEFLATED)
        about = f"Metadata-Version: 2.1\nName: shoal\nVersion: {version}\n"
        archive.writestr(zipfile.ZipInfo(f"shoal-{version}.dist-info/METADATA"), about)


def _compiled(path: Path, name: str) -> bytes:
    """The module as bytecode: out of a zip Python keeps none, and every worker would compile all of Shoal anew."""
    with tempfile.NamedTemporaryFile(suffix=".pyc") as made:
        py_compile.compile(
            str(path), made.name, name, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )
        return Path(made.name).read_bytes()
