"""What is where in a model's folder as diffusers lays it out."""

from collections.abc import Iterable

INDEX = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = (".safetensors", ".gguf")  # endings of files that are read


def told(names: Iterable[str]) -> str:
    """Names of networks and phases as users read them in a sentence."""
    *most, last = [name.replace("_", " ").replace("vae", "VAE") for name in names]
    return f"{', '.join(most)} and {last}" if most else last
