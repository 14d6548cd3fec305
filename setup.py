"""Packaging of keras_influence."""

import pathlib

import setuptools

EXAMPLES = [
    "importlib_resources",  # tensorflow-datasets 4.9.10 imports it and does not ask for it
    "keras-hub>=0.32",
    "matplotlib>=3.8",
    "sacrebleu>=2.4",
    "safetensors>=0.4",
    "sentencepiece>=0.2",
    "tensorflow-datasets>=4.9.10",
    "tokenizers>=0.20",
]

FAISS = ["faiss-cpu>=1.8"]

TEST = [
    *FAISS,
    "hypothesis>=6.100",
    "keras-hub>=0.32",
    "matplotlib>=3.8",
    # Held to one minor version each: a newer formatter or checker may disagree with this tree.
    "mypy==2.4.*",
    "pytest>=8.4",
    "pytest-xdist>=3.6",
    "ruff==0.17.*",
    "sacrebleu>=2.4",
    "safetensors>=0.4",
    "sentencepiece>=0.2",
    "tokenizers>=0.20",
]

setuptools.setup(
    name="keras-influence",
    version="0.1.0",
    description="Which training examples made this prediction? Influence functions for Keras.",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["keras_influence", "keras_influence.*"]),
    package_data={"keras_influence": ["py.typed"]},
    install_requires=[
        "absl-py>=2.1",
        "joblib>=1.2",
        "keras>=3.15",
        "ml_dtypes>=0.4",
        "numpy>=1.26",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "tensorflow>=2.21",
        "tensorstore>=0.1.80",
        "threadpoolctl>=3.1",
    ],
    extras_require={"examples": EXAMPLES, "faiss": FAISS, "test": TEST},
    # Not `build`: where file names ignore case, the BUILD file is already there.
    options={"build": {"build_base": ".build"}},
    zip_safe=False,
)
