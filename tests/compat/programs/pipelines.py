"""diffusers' pipelines with LoRA files: a small Stable Diffusion, and a small Flux."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

import peft
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from facts import apart, size, tell
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

FOLDER = tempfile.mkdtemp()
WEIGHTS = "pytorch_lora_weights.safetensors"
NUMBERS = torch.Generator().manual_seed(3)
PROMPT = {
    "prompt_embeds": torch.randn(1, 6, 32, generator=NUMBERS),
    "pooled_prompt_embeds": torch.randn(1, 32, generator=NUMBERS),
}


def tokenizer() -> CLIPTokenizer:
    marks = ["<|startoftext|>", "<|endoftext|>", "a</w>", "cat</w>", "c", "a", "t</w>", "ca"]
    with open(f"{FOLDER}/vocab.json", "w") as file:
        json.dump({mark: i for i, mark in enumerate(marks)}, file)
    with open(f"{FOLDER}/merges.txt", "w") as file:
        file.write("#version: 0.2\nc a\nca t</w>\n")
    return CLIPTokenizer(f"{FOLDER}/vocab.json", f"{FOLDER}/merges.txt", model_max_length=8)


def autoencoder(**options: Any) -> AutoencoderKL:
    channels = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [4],
        "norm_num_groups": 1,
    }
    return AutoencoderKL(**channels, **options)


def stable_diffusion() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "vocab_size": 16,
        "max_position_embeddings": 8,
    }
    text = CLIPTextConfig(num_attention_heads=2, num_hidden_layers=2, **sizes)
    pipe = StableDiffusionPipeline(
        vae=autoencoder(latent_channels=4),
        unet=unet,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    nothing = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    vae = autoencoder(latent_channels=1, shift_factor=0.06, scaling_factor=1.5)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **nothing)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, **options: Any) -> Tensor:
    prompt = PROMPT if isinstance(pipe, FluxPipeline) else {"prompt": "a cat"}
    fixed = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    shape = {"height": 8, "width": 8, "output_type": "np"}
    return torch.tensor(pipe(**prompt, **fixed, **shape, **options).images)


def write_lora(folder: str, pipe: Any, seed: int, rank: int, *components: str) -> str:
    """A LoRA file in diffusers' format for the attention of these parts of a pipeline."""
    numbers, tensors = torch.Generator().manual_seed(seed), {}
    ends = ("to_q", "to_v", "to_out.0", "q_proj", "v_proj", "proj_mlp")
    for component in components:
        for name, module in getattr(pipe, component).named_modules():
            if isinstance(module, nn.Linear) and name.endswith(ends):
                for side, shape in {
                    "A": (rank, module.in_features),
                    "B": (module.out_features, rank),
                }.items():
                    key = f"{component}.{name}.lora_{side}.weight"
                    tensors[key] = torch.randn(shape, generator=numbers) * 0.3
    os.makedirs(f"{FOLDER}/{folder}")
    save_file(tensors, f"{FOLDER}/{folder}/{WEIGHTS}")
    return f"{FOLDER}/{folder}"


def unet_case(found: dict[str, Any]) -> None:
    pipe = stable_diffusion()
    base = image(pipe)
    wide = write_lora("wide", pipe, 1, 4, "unet", "text_encoder")
    narrow = write_lora("narrow", pipe, 2, 2, "unet")
    pipe.load_lora_weights(wide, adapter_name="wide")
    one = image(pipe)
    found["it acts"] = apart(one, base) > 0
    pipe.load_lora_weights(narrow, adapter_name="narrow")
    found["adapters"] = pipe.get_list_adapters()
    pipe.set_adapters(["wide", "narrow"], [0.5, 0.7])
    both = image(pipe)
    found["both"] = size(both), pipe.unet.active_adapters()
    pipe.set_adapters(["wide", "narrow"], [{"unet": {"down": 0.3, "mid": 0.5, "up": 0.8}}, 0.7])
    found["block by block"] = size(image(pipe))
    pipe.set_adapters("wide")
    found["one again"] = apart(image(pipe), one)
    found["scaled for a call"] = size(image(pipe, cross_attention_kwargs={"scale": 0.5}))
    found["no longer scaled"] = apart(image(pipe), one)
    pipe.fuse_lora()
    found["fused"] = apart(image(pipe), one), pipe.num_fused_loras, sorted(pipe.fused_loras)
    pipe.unfuse_lora()
    found["unfused"] = apart(image(pipe), one), pipe.num_fused_loras
    pipe.disable_lora()
    found["disabled"] = apart(image(pipe), base)
    pipe.enable_lora()
    found["enabled"] = apart(image(pipe), one)
    pipe.delete_adapters("narrow")
    found["one is left"] = pipe.get_list_adapters(), apart(image(pipe), one)
    pipe.delete_adapters("wide")
    found["none is left"] = pipe.get_list_adapters(), apart(image(pipe), base)
    unloaded(found, pipe, wide, base)


def unloaded(found: dict[str, Any], pipe: Any, file: str, base: Tensor) -> None:
    """Taken out by diffusers itself, put in again, and fused for good."""
    pipe.load_lora_weights(file, adapter_name="wide")
    one = image(pipe)
    pipe.unload_lora_weights()
    found["unloaded"] = pipe.get_list_adapters(), apart(image(pipe), base)
    found["nothing is wrapped"] = any("base_layer" in name for name in pipe.unet.state_dict())
    pipe.load_lora_weights(file, adapter_name="wide")
    found["loaded again"] = pipe.get_list_adapters(), apart(image(pipe), one)
    pipe.fuse_lora(lora_scale=0.5, adapter_names=["wide"])
    fused = image(pipe)
    found["fused at half"] = size(fused)
    pipe.unload_lora_weights()
    found["fused for good"] = apart(image(pipe), fused)


def training_case(found: dict[str, Any]) -> None:
    """As diffusers' training scripts do it: add, save with its config, load by that."""
    unet = stable_diffusion().unet
    unet.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    found["trained"] = sum(p.requires_grad for p in unet.parameters())
    unet.save_lora_adapter(f"{FOLDER}/trained")
    other = stable_diffusion().unet
    other.load_lora_adapter(f"{FOLDER}/trained", prefix=None, weight_name=WEIGHTS)
    config = other.peft_config["default_0"]
    found["its config came with it"] = config.r, config.lora_alpha


def flux_case(found: dict[str, Any]) -> None:
    pipe = flux()
    base = image(pipe)
    wide = write_lora("flux-wide", pipe, 1, 4, "transformer")
    narrow = write_lora("flux-narrow", pipe, 2, 2, "transformer")
    pipe.load_lora_weights(wide, adapter_name="wide")
    one = image(pipe)
    found["flux: it acts"] = apart(one, base) > 0
    pipe.load_lora_weights(narrow, adapter_name="narrow")
    pipe.set_adapters(["wide", "narrow"], [0.5, 0.7])
    found["flux: both"] = size(image(pipe))
    pipe.set_adapters("wide")
    found["flux: scaled"] = size(image(pipe, joint_attention_kwargs={"scale": 0.5}))
    pipe.fuse_lora(components=["transformer"])
    found["flux: fused"] = apart(image(pipe), one)
    pipe.unfuse_lora(components=["transformer"])
    found["flux: unfused"] = apart(image(pipe), one)
    layers = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="wide")
    FluxPipeline.save_lora_weights(f"{FOLDER}/flux-saved", transformer_lora_layers=layers)
    saved, given = load_file(f"{FOLDER}/flux-saved/{WEIGHTS}"), load_file(f"{wide}/{WEIGHTS}")
    found["flux: saved"] = all(torch.equal(saved[key], given[key]) for key in given)
    pipe.delete_adapters(["wide", "narrow"])
    found["flux: deleted"] = apart(image(pipe), base)


def more_of_flux(found: dict[str, Any]) -> None:
    """Hot-swapping, weights stored in 8 bits layer by layer, LoKr, and a file that fits nothing."""
    pipe, other = flux(), flux()
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(f"{FOLDER}/flux-wide", adapter_name="swapped")
    pipe.load_lora_weights(f"{FOLDER}/flux-narrow", adapter_name="swapped", hotswap=True)
    other.load_lora_weights(f"{FOLDER}/flux-narrow")
    found["flux: swapped in"] = apart(image(pipe), image(other))
    other.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    found["flux: cast"] = size(image(other))
    pairs = [p.dtype for n, p in other.transformer.named_parameters() if "lora_" in n]
    found["flux: pairs are not cast"] = sorted({str(dtype) for dtype in pairs})
    numbers, name = torch.Generator().manual_seed(5), "transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lokr_{w}": torch.randn(s, s, generator=numbers) * 0.3 for w, s in LOKR}
    fresh = flux()
    fresh.transformer.load_lora_adapter(tensors, prefix=None, adapter_name="kronecker")
    found["flux: lokr"] = size(image(fresh) - image(flux()))
    nowhere = {f"transformer.nowhere.lora_{s}.weight": torch.ones(4, 4) for s in "AB"}
    before = image(fresh)
    try:
        fresh.load_lora_weights(nowhere, adapter_name="nowhere")
    except ValueError:
        found["flux: a file that fits nothing"] = apart(image(fresh), before)
    found["flux: adapters after that"] = list(fresh.transformer.peft_config)


LOKR = (("w1", 4), ("w2", 8))


if __name__ == "__main__":
    facts: dict[str, Any] = {}
    unet_case(facts)
    training_case(facts)
    flux_case(facts)
    more_of_flux(facts)
    tell(facts)
