from optimizers.learned import *
