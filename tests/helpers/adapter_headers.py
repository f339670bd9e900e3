"""Headers of adapters of full size, as trainers write them."""

from flux2_mlx.config import VARIANTS
from flux2_mlx.weights import TensorInfo

from .headers import Infos

PEFT, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
# What layers of a block take and give, in widths.
DOUBLE = {
    **{f"{stream}_attn.qkv": (1, 3) for stream in ("img", "txt")},
    **{f"{stream}_attn.proj": (1, 1) for stream in ("img", "txt")},
    **{f"{stream}_mlp.0": (1, 6) for stream in ("img", "txt")},
    **{f"{stream}_mlp.2": (3, 1) for stream in ("img", "txt")},
}
SINGLE = {"linear1": (1, 9), "linear2": (4, 1)}
REST = {
    "double_stream_modulation_img.lin": (1, 6),
    "double_stream_modulation_txt.lin": (1, 6),
    "single_stream_modulation.lin": (1, 3),
    "final_layer.adaLN_modulation.1": (1, 2),
    "time_in.out_layer": (1, 1),
}
DIFFUSERS = {
    **{f"attn.{x}": (1, 1) for x in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
    **{f"attn.add_{x}_proj": (1, 1) for x in "qkv"},
    **{f"{x}.linear_in": (1, 6) for x in ("ff", "ff_context")},
    **{f"{x}.linear_out": (3, 1) for x in ("ff", "ff_context")},
}


def modules(model: str, double=DOUBLE, single=SINGLE, blocks=("double_blocks", "single_blocks")) -> dict:
    config = VARIANTS[model].transformer
    found = {f"{blocks[0]}.{n}.{name}": size for n in range(config.num_layers) for name, size in double.items()}
    return found | {f"{blocks[1]}.{n}.{x}": y for n in range(config.num_single_layers) for x, y in single.items()}


def lora(sizes: dict, width: int, start="diffusion_model.", ends=PEFT, rank=16, alpha=False, flat=False) -> Infos:
    infos: Infos = {}
    for name, (inputs, outputs) in sizes.items():
        module = start + (name.replace(".", "_") if flat else name)
        infos[f"{module}.{ends[0]}"] = TensorInfo("BF16", (rank, inputs * width))
        infos[f"{module}.{ends[1]}"] = TensorInfo("BF16", (outputs * width, rank))
        if alpha:
            infos[f"{module}.alpha"] = TensorInfo("BF16", ())
    return infos


def ai_toolkit(model: str) -> Infos:
    return lora(modules(model), VARIANTS[model].transformer.hidden_size)
