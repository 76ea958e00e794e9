"""A comparison of a few priors that takes seconds."""

SMALL_FIT = {
    "steps": 60,
    "evaluate_every": 30,
    "network_options": {"width": 8, "blocks": 1, "members": 1},
    "log_z_draws": 500,
}


def options(**changes):
    return {
        "priors": ["gaussian", "mixture", "ncp"],
        "seeds": 2,
        "samples": 200,
        "proposals": 50,
        "images": 20,
        "importance_samples": 5,
        "fit": SMALL_FIT,
    } | changes
