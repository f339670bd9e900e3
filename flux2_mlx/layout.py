"""What is where in a model's folder as diffusers lays it out."""

from collections.abc import Iterable

INDEX = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = (".safetensors", ".gguf")  # endings of files that are read
_WORDS = {"vae": "VAE", "vision": "vision tower"}  # of names, that users read otherwise


def told(names: Iterable[str]) -> str:
    """Names of networks and phases as users read them in a sentence."""
    *most, last = [" ".join(_WORDS.get(word, word) for word in name.split("_")) for name in names]
    return f"{', '.join(most)} and {last}" if most else last
