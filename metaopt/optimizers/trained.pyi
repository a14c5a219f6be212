from optimizers.trained import *
