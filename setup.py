"""The distribution `funmatch`. One extra chooses TensorFlow: cpu, gpu or tpu, never two."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"


def version() -> str:
    """Read the version without importing the package, which needs TensorFlow."""
    source = (HERE / "trainer" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('trainer/__init__.py has no line __version__ = "..."')
    return found[1]


# `tensorflow` and `tensorflow-tpu` own the same files of site-packages, so neither may be an
# unconditional requirement: the one that pip installs last would silently overwrite the other.
TENSORFLOW = ">=2.19.1,<2.22"

EXTRAS = {
    "cpu": [f"tensorflow{TENSORFLOW}"],
    "gpu": [f"tensorflow[and-cuda]{TENSORFLOW}"],
    # Exact, because a TPU wheel and its libtpu must match to the build.
    "tpu": ["tensorflow-tpu==2.19.1", "libtpu==0.0.10"],
    # Only to wait for a named TPU node. Not for Vertex AI: it hides TensorFlow's own, newer
    # client.
    "tpu-client": ["cloud-tpu-client"],
    # tensorflow-metadata 1.21 needs protobuf 6.31 without saying so; TensorFlow 2.19 needs 5.
    # It reads oxford_flowers102 with scipy and does not require it.
    "datasets": ["tensorflow-datasets>=4.9.9", "tensorflow-metadata<1.18", "scipy"],
    "kaggle": ["kaggle>=2.2,<3"],
    # HEIC and JPEG XL. Their wheels contain libraries under the GPL, so they are in no image.
    # Pillow reads AVIF since 11.3.
    "images": ["pillow>=11.3", "pillow-heif>=1", "pillow-jxl-plugin>=1.3"],
    "report": ["jinja2>=3.1", "matplotlib>=3.8"],
    # Job specs are YAML (deploy/).
    "deploy": ["pyyaml>=6"],
    "dev": [
        "cryptography>=42",
        "mypy",
        "pip-tools",
        "pytest>=8",
        "pytest-timeout",
        "pyyaml>=6",
        "ruff",
        "scipy",
    ],
}

setup(
    name="funmatch",
    version=version(),
    description="Function matching knowledge distillation (arXiv 2106.05237) on CPU, GPU and TPU",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The funmatch authors",
    license="Apache-2.0",
    packages=find_packages(include=["trainer", "trainer.*"]),
    package_data={"trainer.output": ["report.html"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        "absl-py>=2.1",
        "google-cloud-storage>=3,<4",
        "google-crc32c>=1.5",
        "keras>=3.12",
        "numpy>=1.26",
        "pillow>=10",
        "rich>=13",
        "simplejpeg>=1.8",
        "setuptools<82",  # TensorBoard 2.19 imports pkg_resources, which 82 dropped.
        "tensorboard>=2.19",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["funmatch = trainer.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
