from optimizers.schedules import *
