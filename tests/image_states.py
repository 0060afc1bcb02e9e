"""State dicts of image encoders as Hugging Face transformers writes them, with random values."""

import numpy as np

DINOV2 = {
    "model_type": "dinov2_with_registers",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "mlp_ratio": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_register_tokens": 2,
    "use_swiglu_ffn": False,
    "hidden_act": "gelu",
    "initializer_range": 0.02,
}
SWIGLU = DINOV2 | {"use_swiglu_ffn": True}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
}


def draw(shapes, seed=0):
    """Random arrays; the scale keeps a small network's features near 1."""
    rng = np.random.default_rng(seed)
    return {k: (0.3 * rng.standard_normal(shape)).astype("f4") for k, shape in shapes.items()}


def layer(key, outputs, inputs):
    return {f"{key}.weight": (outputs, inputs), f"{key}.bias": (outputs,)}


def norm(key, channels):
    return {f"{key}.weight": (channels,), f"{key}.bias": (channels,)}


def dinov2_state(config):
    """The names of transformers 5."""
    c, edge = config["hidden_size"], config["patch_size"]
    shapes = {
        "embeddings.cls_token": (1, 1, c),
        "embeddings.mask_token": (1, c),
        "embeddings.register_tokens": (1, config["num_register_tokens"], c),
        "embeddings.position_embeddings": (1, 1 + (config["image_size"] // edge) ** 2, c),
        "embeddings.patch_embeddings.projection.weight": (c, 3, edge, edge),
        "embeddings.patch_embeddings.projection.bias": (c,),
        **norm("layernorm", c),
    }
    hidden = c * config["mlp_ratio"]
    for i in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= layer(f"{at}.attention.{name}", c, c)
        for number in (1, 2):
            shapes |= norm(f"{at}.norm{number}", c)
            shapes[f"{at}.layer_scale{number}.lambda1"] = (c,)
        if config["use_swiglu_ffn"]:
            inner = (hidden * 2 // 3 + 7) // 8 * 8
            shapes |= layer(f"{at}.mlp.gate_proj", inner, c) | layer(f"{at}.mlp.up_proj", inner, c)
            shapes |= layer(f"{at}.mlp.down_proj", c, inner)
        else:
            shapes |= layer(f"{at}.mlp.fc1", hidden, c) | layer(f"{at}.mlp.fc2", c, hidden)
    return draw(shapes)


def names_of_4(state):
    """The same arrays by the names that files on the hub have, from before transformers 5."""
    turned = {}
    for key, array in state.items():
        if ".up_proj." in key:
            continue
        if ".gate_proj." in key:
            array = np.concatenate([array, state[key.replace("gate", "up")]])
        for new, old in (
            *((f"attention.{n[0]}_proj", f"attention.attention.{n}") for n in ("query", "value")),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.gate_proj", "mlp.weights_in"),
            ("mlp.down_proj", "mlp.weights_out"),
        ):
            key = key.replace(new, old)
        turned[key] = array
    return turned


def siglip_state(config, prefix=""):
    """The image tower with its pooling head."""
    c, edge, hidden = (config[k] for k in ("hidden_size", "patch_size", "intermediate_size"))
    shapes = {
        "embeddings.patch_embedding.weight": (c, 3, edge, edge),
        "embeddings.patch_embedding.bias": (c,),
        "embeddings.position_embedding.weight": ((config["image_size"] // edge) ** 2, c),
        **norm("post_layernorm", c),
        "head.probe": (1, 1, c),
        "head.attention.in_proj_weight": (3 * c, c),
        **norm("head.layernorm", c),
    }
    for i in range(config["num_hidden_layers"]):
        at = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= layer(f"{at}.self_attn.{name}", c, c)
        shapes |= norm(f"{at}.layer_norm1", c) | norm(f"{at}.layer_norm2", c)
        shapes |= layer(f"{at}.mlp.fc1", hidden, c) | layer(f"{at}.mlp.fc2", c, hidden)
    return {prefix + key: array for key, array in draw(shapes).items()}
