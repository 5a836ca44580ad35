"""The metrics of the losses, in the order in which kernels write them (csrc/abi_losses.h)."""

POLICY_METRICS = (
    *("loss", "pg_loss", "kl_loss", "entropy_loss"),
    *("clip_frac_low", "clip_frac_high", "dual_clip_frac"),
    *("gate_frac_low", "gate_frac_high"),
    *("ratio_mean", "ratio_min", "ratio_max"),
    *("k1_old", "k3_old", "k1_ref", "k3_ref"),
    *("entropy", "ess", "correction_mean", "tokens"),
)
VALUE_METRICS = ("loss", "clip_frac", "value_mean", "return_mean", "explained_variance", "tokens")
MISMATCH_METRICS = (
    *("weight_mean", "weight_std", "weight_min", "weight_max", "ess"),
    *("fraction_low", "fraction_high", "raw_min", "raw_max"),
    *("seq_weight_mean", "seq_weight_std", "seq_weight_min", "seq_weight_max"),
    *("seq_max_deviation", "seq_fraction_low", "seq_fraction_high", "norm_factor"),
    *("kl", "k3_kl", "chi2_token", "chi2_seq"),
    *("training_ppl", "training_log_ppl", "rollout_ppl", "rollout_log_ppl"),
    *("log_ppl_diff", "log_ppl_abs_diff", "log_ppl_diff_min", "log_ppl_diff_max", "ppl_ratio"),
    *("rejected", "rejected_sequences", "missing", "sequences", "tokens"),
)
