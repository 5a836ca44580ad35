"""The metrics of the losses, in the order in which kernels write them (csrc/abi.h)."""

POLICY_METRICS = (
    *("loss", "pg_loss", "kl_loss", "entropy_loss"),
    *("clip_frac_low", "clip_frac_high", "dual_clip_frac"),
    *("ratio_mean", "ratio_min", "ratio_max"),
    *("k1_old", "k3_old", "k1_ref", "k3_ref"),
    *("entropy", "ess", "correction_mean", "tokens"),
)
VALUE_METRICS = ("loss", "clip_frac", "value_mean", "return_mean", "explained_variance", "tokens")
