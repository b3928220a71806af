"""Games against an adversary, correction of hidden states in closed loop, and tilted losses."""

from bolza.robust.adversarial_training import AdversarialStep, fast, pgd_training
from bolza.robust.attacks import fgsm, pgd
from bolza.robust.closed_loop import ClosedLoopControls, closed_loop_controls
from bolza.robust.evaluate import RobustAccuracy, RobustnessCurve, robust_accuracy, robustness_curve
from bolza.robust.free import free
from bolza.robust.healing_report import HealingReport, HealingRow
from bolza.robust.linear_game import LinearGame, critical_price, linear_game
from bolza.robust.manifolds import Autoencoder, Subspace
from bolza.robust.self_healing import SelfHealing, control_gains
from bolza.robust.tilted import TiltedLoss, tilted_loss, tilted_mean
from bolza.robust.tilted_layers import (
    TiltedConv1d,
    TiltedConv2d,
    TiltedLinear,
    competition,
    with_tilted_reward,
)
from bolza.robust.tilted_sam import TiltedSAM, tilted_quadratic
from bolza.robust.trades import trades
from bolza.robust.yopo import yopo

__all__ = [
    "AdversarialStep",
    "Autoencoder",
    "ClosedLoopControls",
    "HealingReport",
    "HealingRow",
    "LinearGame",
    "RobustAccuracy",
    "RobustnessCurve",
    "SelfHealing",
    "Subspace",
    "TiltedConv1d",
    "TiltedConv2d",
    "TiltedLinear",
    "TiltedLoss",
    "TiltedSAM",
    "closed_loop_controls",
    "competition",
    "control_gains",
    "critical_price",
    "fast",
    "fgsm",
    "free",
    "linear_game",
    "pgd",
    "pgd_training",
    "robust_accuracy",
    "robustness_curve",
    "tilted_loss",
    "tilted_mean",
    "tilted_quadratic",
    "trades",
    "with_tilted_reward",
    "yopo",
]
