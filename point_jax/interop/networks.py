"""Which network a state dict belongs to: what its arrays say, and what has to be told.

Keys and shapes say how deep and wide a network is. They do not say how channels split into heads,
how long patches are, or which curves the blocks follow: that comes with a release file's config, or
from `--network`, and is never guessed.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from point_jax.interop.files import State, read_json
from point_jax.interop.published import PUBLISHED
from point_jax.interop.release import Variant, spec_of, variant_of
from point_jax.training.checkpoint import CheckpointError

# What no array shows (rotary networks show their heads, and relative biases do).
UNSEEN = ("enc_num_head", "enc_patch_size", "order", "stride")


def facts_of(state: State) -> dict[str, Any]:
    """Constructor arguments that a backbone's keys and shapes determine.

    Args:
      state: the backbone's arrays, keys without prefix.

    Returns:
      Argument -> JSON value; without those that damaged arrays do not show.
    """
    facts: dict[str, Any] = {}
    for stem in ("embedding.stem.linear.weight", "embedding.stem.conv.weight"):
        if stem in state and state[stem].ndim > 1:
            facts["in_channels"] = state[stem].shape[-1]
    for part in ("enc", "dec"):
        blocks: dict[int, set[int]] = {}
        for key in state:
            if found := re.match(rf"{part}\.{part}(\d+)\.block(\d+)\.", key):
                blocks.setdefault(int(found[1]), set()).add(int(found[2]))
        if part == "dec":
            facts["enc_mode"] = not blocks
        if not blocks or sorted(blocks) != list(range(len(blocks))):
            continue
        facts[f"{part}_depths"] = [len(blocks[level]) for level in sorted(blocks)]
        first = [f"{part}.{part}{level}.block0" for level in sorted(blocks)]
        if columns := _sizes(state, [f"{name}.norm1.0.weight" for name in first], 0):
            facts[f"{part}_channels"] = columns
        if heads := _sizes(state, [f"{name}.attn.rpe.rpe_table" for name in first], 1):
            facts[f"{part}_num_head"] = heads
        turns = _sizes(state, [f"{name}.attn.rope.inv_freq" for name in first], 0)
        if turns and columns and all(turns):
            heads = [c / (6 * n) for c, n in zip(columns, turns, strict=True)]
            facts[f"{part}_num_head"] = [int(n) if n.is_integer() else n for n in heads]
    hidden = state.get("enc.enc0.block0.mlp.0.fc1.weight")
    if hidden is not None and hidden.ndim == 2 and hidden.size:
        facts["mlp_ratio"] = hidden.shape[0] / hidden.shape[1]
    facts["mask_token"] = "embedding.mask_token" in state
    facts["dec_rope_enable"] = any(re.match(r"dec\..*inv_freq$", key) for key in state)
    facts["enable_rpe"] = any(key.endswith(".rpe_table") for key in state)
    return facts


def _sizes(state: State, keys: list[str], axis: int) -> list[int]:
    """One size of each of some arrays; empty unless all are there."""
    if all(key in state and state[key].ndim > axis for key in keys):
        return [state[key].shape[axis] for key in keys]
    return []


def find_network(name: str) -> dict[str, Any]:
    """The config that `--network` names.

    Args:
      name: a published name, or a JSON file with the constructor's arguments (or with them under
        "config", as in a manifest).

    Raises:
      CheckpointError: there is neither.
    """
    if name in PUBLISHED and PUBLISHED[name].kind != "linear_head":
        return PUBLISHED[name].config
    if not Path(name).is_file():
        names = [key for key, entry in PUBLISHED.items() if entry.kind != "linear_head"]
        raise CheckpointError(
            f"no network {name!r}: expected {', '.join(names)}, or a JSON file with the "
            "constructor's arguments"
        )
    config = read_json(Path(name))
    return config["config"] if isinstance(config.get("config"), dict) else config


def settle_network(
    states: Mapping[str, State], given: dict[str, Any] | None, network: str | None, file: Path
) -> tuple[Variant, dict[str, Any]]:
    """Mode and config of the backbones of a file.

    Args:
      states: the file's backbones by name ("", "student", ...): all must be of one network.
      given: the config in the file, if any; then `network` must agree with it or be None.
      network: see `find_network`.
      file: for messages.

    Raises:
      CheckpointError: the config is missing, or does not fit the arrays; says what does not.
    """
    variant = variant_of(list(next(iter(states.values()))))
    facts = {name: facts_of(state) for name, state in states.items()}
    if given is None and network is None:
        raise CheckpointError(_ask(variant, next(iter(facts.values())), file))
    config = dict(given) if given is not None else find_network(str(network))
    if given is None:
        # Keys alone decide these; the same network is trained with and without.
        seen = next(iter(facts.values()))
        switches = ["enc_mode"] if variant == "PT-v3m1" else ["enc_mode", "mask_token"]
        if variant == "PT-v3m3" and not (seen["enc_mode"] or seen["dec_rope_enable"]):
            switches.append("dec_rope_enable")  # Utonia's package does not know the argument
        config = config | {name: seen[name] for name in switches}
        missing = [n for n in ("dec_num_head", "dec_patch_size") if n not in config]
        if not config["enc_mode"] and missing:
            raise CheckpointError(
                f"{file} has a decoder, and {network} does not say its {' and '.join(missing)}: "
                "name a network with a decoder (--network)"
            )
    spec = _spec(config, variant, file)
    if given is not None and network is not None:
        if _spec(find_network(network), variant, Path(network)) == spec:
            return variant, config
        raise CheckpointError(f"{file} has a config of its own, which is not {network}'s")
    width = spec.encoder[0].channels
    effective: dict[str, Any] = {
        "in_channels": spec.inputs,
        "enc_mode": not spec.decoder,
        "mask_token": spec.mask_token,
        "enable_rpe": spec.relative_bias,
        "dec_rope_enable": bool(spec.decoder and spec.rotary and spec.rotary.decoder),
        "mlp_ratio": int(width * spec.mlp_ratio) / width,
    }
    for part, stages in (("enc", spec.encoder), ("dec", spec.decoder)):
        effective[f"{part}_depths"] = [stage.depth for stage in stages]
        effective[f"{part}_channels"] = [stage.channels for stage in stages]
        effective[f"{part}_num_head"] = [stage.heads for stage in stages]
    wrong = [
        f"{f'{name}: ' if name else ''}{key} is {value} in the arrays, {effective[key]} in the "
        f"{'config' if given is not None else f'network {network}'}"
        for name, seen in facts.items()
        for key, value in seen.items()
        if value != effective[key]
    ]
    if wrong and given is None:
        hint = ""
        if len({str(seen) for seen in facts.values()}) > 1:
            hint = "; student and teacher are of different networks: take one of them, --tree"
        raise CheckpointError(f"{file} is of another network: {'; '.join(wrong)}{hint}")
    return variant, config


def _spec(config: Mapping[str, Any], variant: Variant, file: Path) -> Any:
    try:
        return spec_of(config, variant)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _ask(variant: Variant, facts: dict[str, Any], file: Path) -> str:
    """What to tell the person about a file without config."""
    unseen = [name for name in UNSEEN if name not in facts]
    unseen += ["dec_patch_size"] if not facts["enc_mode"] else []
    unseen += ["rope_base"] if variant == "PT-v3m3" else []
    kind = "encoder" if facts["enc_mode"] else "segmentor"
    fits = [
        name
        for name, entry in PUBLISHED.items()
        if (entry.kind, entry.variant) == (kind, variant) and _fits(entry.config, facts)
    ]
    text = ", ".join(
        f"{key}={value}"
        for key, value in facts.items()
        if not (facts["enc_mode"] and key.startswith("dec_"))
    )
    choice = f"of the published, {', '.join(fits)} would fit" if fits else "no published one fits"
    return (
        f"{file} does not hold its network's config. Its arrays say {variant}, {text}; they do not "
        f"say {', '.join(unseen)}. Give --network=NAME or --network=FILE.json; {choice}"
    )


def _fits(config: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    names = ("in_channels", "enc_depths", "enc_channels", "dec_depths", "dec_channels", "mlp_ratio")
    return all(config.get(name) == facts.get(name) for name in names)
