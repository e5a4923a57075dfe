"""Metadata, dependencies and the mapping of the top-level folders into one package."""

from pathlib import Path

from setuptools import setup

EXTRAS = {
    "triton": ["triton>=3.6"],
    "dali": ["nvidia-dali-cuda130>=2.4"],
    "video": ["av>=14"],
    "plots": ["matplotlib>=3.9"],
}

setup(
    name="smtc",
    version="0.1.0",
    description="SMTC: self-supervised object-centric learning in video, built for throughput",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The folders live at the top level but install under one name: a top-level package called
    # `kernels` would overwrite the well-known one of that name.
    package_dir={
        "smtc": "smtc",
        "smtc.kernels": "kernels",
        "smtc.pipelines": "pipelines",
        "smtc.benchmarks": "benchmarks",
    },
    packages=[
        "smtc",
        "smtc.training",
        "smtc.evaluation",
        "smtc.kernels",
        "smtc.pipelines",
        "smtc.benchmarks",
    ],
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "scipy>=1.12",
        "opencv-python-headless>=4.9",
        "Pillow>=10",
        "safetensors>=0.4.3",
        "tyro>=0.9.2",
        "tqdm>=4.66",
        "tensorboard>=2.16",
    ],
    extras_require={
        **EXTRAS,
        "all": sorted({need for needs in EXTRAS.values() for need in needs}),
        # Its wheels follow their own torch and CUDA versions, so it is never part of `all`.
        "xformers": ["xformers>=0.0.35"],
        # For `smtc export --format onnx` alone.
        "onnx": ["onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.32"],
        "dev": [
            "mypy>=1.13",
            "pytest>=8",
            "pytest-cov>=5",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "setuptools>=77",
            "wheel>=0.43",
        ],
    },
    entry_points={"console_scripts": ["smtc = smtc.cli:main"]},
)
