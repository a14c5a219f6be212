from optimizers.transforms import *
