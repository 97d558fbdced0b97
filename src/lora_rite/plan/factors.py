"""The names that libraries give the factors of pairs, and why a parameter of another name is none."""

#: Name of A → name of B, as a whole segment of a dotted parameter name.
FACTOR_NAMES = {
    "lora_A": "lora_B",  # PEFT
    "lora_embedding_A": "lora_embedding_B",  # PEFT, embeddings
    "lora_down": "lora_up",  # diffusers, sd-scripts, LyCORIS
    "lora_a": "lora_b",  # torchtune
    "hira_A": "hira_B",  # HiRA: ΔW = W⊙(B·A)
    "hira_embedding_A": "hira_embedding_B",
    "hada_w1_b": "hada_w1_a",  # LoHa: ΔW = (w1_a·w1_b)⊙(w2_a·w2_b), two pairs a layer
    "hada_w2_b": "hada_w2_a",
    "lokr_w1_b": "lokr_w1_a",  # LoKr: ΔW = w1⊗w2, of which each may be a product
    "lokr_w2_b": "lokr_w2_a",
}
#: A parameter of this name beside A and B stands between them: ΔW = B·(it)·A, which has not the invariance of B·A.
BETWEEN_NAMES = ("lora_E", "lora_diag", "lora_mid", "hada_t1", "hada_t2", "lokr_t2")
#: Behind a factor's name: the parameter is what a parametrization makes the factor of (torch.nn.utils.parametrize, and
#: the older weight_norm, spectral_norm and prune).
PARAMETRIZED = ("parametrizations", "weight_g", "weight_v", "weight_orig")
NO_FACTOR = "not a LoRA factor"
#: Begin of a segment of a name → why a parameter of that name is no factor of a pair.
REASONS = {
    "lora_magnitude_vector": "DoRA's magnitudes, a vector",
    "lora_monteclora_sampler": "MonteCLoRA's sampler",
    "modules_to_save": "a whole layer (modules_to_save)",
    "trainable_tokens_delta": "whole rows of an embedding (trainable tokens)",
    "lokr_w": "LoKr's Kronecker factor, not decomposed",
    "vera_": "VeRA trains vectors beside frozen matrices",
    "pvera_": "PVeRA trains vectors beside frozen matrices",
    "randlora_": "RandLoRA trains vectors beside frozen matrices",
    "vblora_": "VB-LoRA trains a bank of vectors",
    "delora_": "DeLoRA normalises each column of B and row of A, so that not only B·A counts",
    "gralora_": "GraLoRA has the factors of several blocks in one tensor",
    "poly_lora_": "Poly has the factors of several skills in one tensor",
    "lily_": "Lily shares factors between layers by a router, so that they are no pairs",
    "glora_": "GLoRA scales and shifts weights and biases by several products at once",
}


def partner_of(name: str) -> str | None:
    """The name of the other factor, or None where ``name`` is not a factor's."""
    segments = name.split(".")
    if segments[-1] == "bias":
        return None
    for i in reversed(range(len(segments))):
        for a, b in FACTOR_NAMES.items():
            if segments[i] in (a, b):
                segments[i] = b if segments[i] == a else a
                return ".".join(segments)
    return None


def is_a(name: str) -> bool:
    return next(s in FACTOR_NAMES for s in reversed(name.split(".")) if s in {*FACTOR_NAMES, *FACTOR_NAMES.values()})


def is_parametrized(name: str) -> bool:
    """Whether a factor is computed from the parameter of this name by more than taking it."""
    segments = name.split(".")
    factor = [i for i, s in enumerate(segments) if s in {*FACTOR_NAMES, *FACTOR_NAMES.values()}]
    return bool(factor) and any(s in PARAMETRIZED for s in segments[factor[-1] + 1 :])


def layer_of(name: str) -> str:
    """The name of the layer that holds a factor: everything before its ``lora_…`` segment."""
    known = {*FACTOR_NAMES, *FACTOR_NAMES.values(), *BETWEEN_NAMES}
    segments = name.split(".")
    return ".".join(segments[: max(i for i, s in enumerate(segments) if s in known)])


def why_not(name: str) -> str:
    """Why a parameter that has no partner is not part of a pair."""
    found = [why for begin, why in REASONS.items() if any(s.startswith(begin) for s in name.split("."))]
    return found[0] if found else NO_FACTOR
