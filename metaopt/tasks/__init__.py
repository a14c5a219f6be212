"""Ready task families on data that needs no download."""

from metaopt.tasks.characters import CharacterLSTM, CharacterTransformer
from metaopt.tasks.digits import DigitsMLP
from metaopt.tasks.episode import Episode
from metaopt.tasks.examples import Classes, Reconstruction, Teacher, Waves, table
from metaopt.tasks.families import Mixture, RandomMLPs, RandomTeachers, Rescaled, small_networks
from metaopt.tasks.few_shot import OmniglotClasses
from metaopt.tasks.functions import NoisyQuadratics, Rosenbrock
from metaopt.tasks.held_out import HeldOut, held_out_families, stress_families
from metaopt.tasks.networks import MLP, ConvNet
from metaopt.tasks.quadratics import Quadratics
from metaopt.tasks.supervised import Supervised

__all__ = [
    "MLP",
    "CharacterLSTM",
    "CharacterTransformer",
    "Classes",
    "ConvNet",
    "DigitsMLP",
    "Episode",
    "HeldOut",
    "Mixture",
    "NoisyQuadratics",
    "OmniglotClasses",
    "Quadratics",
    "RandomMLPs",
    "RandomTeachers",
    "Reconstruction",
    "Rescaled",
    "Rosenbrock",
    "Supervised",
    "Teacher",
    "Waves",
    "held_out_families",
    "small_networks",
    "stress_families",
    "table",
]
