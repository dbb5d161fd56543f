"""What a few families need beside the shared tiny shape."""

SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4},
    "granite": {"residual_multiplier": 0.3},
    "xlnet": {"d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 64},
}
