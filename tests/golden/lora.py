"""Make lora_diffusers, lora_peft, lora_lokr, lora_lycoris and lora_expected .safetensors in a given folder.

With diffusers 0.42.1, peft 0.21.2 and lycoris-lora 4.1.3 (PyPI). The last file has by what each layer's output changes
for the inputs cos(0), cos(1), …; weights of the model are sin(0), sin(1), …
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import Flux2Pipeline, Flux2Transformer2DModel
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

GEOMETRY = {
    "patch_size": 1,
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (2, 2, 2, 2),
    "guidance_embeds": False,
}
folder = Path(sys.argv[1])
torch.manual_seed(0)
expected, configs = {}, {}


def filled(layer):
    layer.weight.data = torch.sin(torch.arange(layer.weight.numel()).float()).reshape(layer.weight.shape)
    return layer


def inputs(count):
    return torch.cos(torch.arange(2 * count).float()).reshape(2, count)


def model():
    made = Flux2Transformer2DModel(**GEOMETRY)
    for layer in made.modules():
        if isinstance(layer, torch.nn.Linear):
            filled(layer)
    return made.requires_grad_(False)


def randomized(module):
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or "lora" in name or "lokr" in name:
            parameter.data = torch.randn_like(parameter) if "magnitude" not in name else parameter.data + 0.5


def record(name, peft_model):
    for module, layer in peft_model.named_modules():
        if hasattr(layer, "base_layer"):
            x = inputs(layer.base_layer.in_features)
            expected[f"{name}.{module.removeprefix('base_model.model.')}"] = layer(x) - layer.base_layer(x)


transformer = model()
config = LoraConfig(
    r=2,
    lora_alpha=6,
    use_rslora=True,
    rank_pattern={"to_q": 4},
    alpha_pattern={"ff.linear_in": 1},
    target_modules=["to_q", "to_v", "to_out.0", "to_qkv_mlp_proj", "norm_out.linear", "ff.linear_in"],
)
transformer.add_adapter(config)
randomized(transformer)
record("diffusers", transformer)
said = {"transformer_lora_adapter_metadata": transformer.peft_config["default"].to_dict()}
said["transformer_lora_adapter_metadata"]["target_modules"] = sorted(config.target_modules)
state = get_peft_model_state_dict(transformer)
Flux2Pipeline.save_lora_weights(folder, transformer_lora_layers=state, weight_name="lora_diffusers.safetensors", **said)

for name, config in {
    "peft": LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["add_k_proj", "linear_in", "x_embedder"]),
    "lokr": LoKrConfig(r=2, alpha=5, decompose_both=True, target_modules=["add_v_proj", "to_add_out", "linear_out"]),
}.items():
    wrapped = get_peft_model(model(), config)
    randomized(wrapped)
    record(name, wrapped)
    wrapped.save_pretrained(folder / name)
    (folder / name / "adapter_model.safetensors").rename(folder / f"lora_{name}.safetensors")
    configs[name] = (folder / name / "adapter_config.json").read_text()

state = {}
CASES = {
    "double_blocks_0_img_attn_qkv": (48, 16, LokrModule, {"lora_dim": 1, "factor": 4}),
    "double_blocks_0_img_attn_proj": (16, 16, LokrModule, {"lora_dim": 1, "factor": 4, "decompose_both": True}),
    "double_blocks_0_img_mlp_0": (96, 16, LokrModule, {"full_matrix": True, "factor": 4, "weight_decompose": True}),
    "double_blocks_0_txt_attn_qkv": (48, 16, LohaModule, {"lora_dim": 2}),
    "double_blocks_0_txt_attn_proj": (16, 16, LohaModule, {"lora_dim": 4, "rs_lora": True, "weight_decompose": True}),
    "double_blocks_0_txt_mlp_0": (96, 16, LoConModule, {"lora_dim": 2, "weight_decompose": True, "wd_on_out": False}),
    "single_blocks_0_linear1": (144, 16, LoConModule, {"lora_dim": 2, "use_scalar": True}),
    "single_blocks_0_linear2": (16, 64, FullModule, {}),
}
for name, (outputs, count, kind, settings) in CASES.items():
    layer = filled(torch.nn.Linear(count, outputs, bias=False))
    module = kind(f"lora_unet_{name}", layer, alpha=3, **settings)
    for role, parameter in module.named_parameters():
        parameter.data = torch.randn_like(parameter) if "dora" not in role else parameter.data + 0.5
    x = inputs(count)
    before = layer(x)
    state |= {f"{module.lora_name}.{role}": x.detach().clone() for role, x in module.custom_state_dict().items()}
    if kind is FullModule:
        expected[f"lycoris.{name}"] = x @ module.weight.T
        state[f"{module.lora_name}.diff"] = module.weight.detach().clone()
        continue
    module.apply_to()
    expected[f"lycoris.{name}"] = layer(x) - before
save_file(state, folder / "lora_lycoris.safetensors", {"ss_network_module": "lycoris.kohya"})
for path in folder.glob("lora_*.safetensors"):
    print(path, {name: tuple(x.shape) for name, x in load_file(path).items()})
save_file({x: y.detach().contiguous() for x, y in expected.items()}, folder / "lora_expected.safetensors", configs)
print(json.dumps(configs, indent=1))
