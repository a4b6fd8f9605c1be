"""The columns of the tables that the kernels read and write, and two constants of formulas.py."""

import triton.language as tl

# Columns of the parameter table, int64 [parameters, COLUMNS].
ROWS = tl.constexpr(0)
COLS = tl.constexpr(1)
M = tl.constexpr(2)  # addresses of the moments, or of r and c
V = tl.constexpr(3)
PROJECTION = tl.constexpr(4)  # offset into all projections
SCRATCH = tl.constexpr(5)  # offset into the partial projections R
PARTS = tl.constexpr(6)  # how many partial rows R comes in: 1 for a tall matrix, row blocks for a wide one
TILE = tl.constexpr(7)  # first tile and number of tiles of pass 1
TILES = tl.constexpr(8)
CHUNK = tl.constexpr(9)  # first chunk and number of chunks of R
CHUNKS = tl.constexpr(10)
ID = tl.constexpr(11)
FIRST = tl.constexpr(12)  # element number of the first element in the unsharded matrix, and that matrix's row length
FULL_COLS = tl.constexpr(13)
GROUP = tl.constexpr(14)
INDEX = tl.constexpr(15)  # the parameter's place in the state area
OUT_TILE = tl.constexpr(16)  # first tile and number of tiles of pass 2
OUT_TILES = tl.constexpr(17)
SIDES = tl.constexpr(18)  # offset into what the factored rule knows of rows and columns
ROW_SCRATCH = tl.constexpr(19)  # offset of its partial sums by row; those by column are at SCRATCH, PARTS of them
STRIP = tl.constexpr(20)  # 1 where one program sees whole rows
STEPS = tl.constexpr(21)  # address of its step count: that of all, or its own
OWN_STEPS = tl.constexpr(22)  # 1 where it is its own: a matrix of a stack
KEPT = tl.constexpr(23)  # elements of R here
LONGEST = tl.constexpr(24)  # of the whole matrix's sides
SECOND = tl.constexpr(25)  # of a shard in pieces: from which row on its rows are numbered how much higher; twice
SECOND_BY = tl.constexpr(26)
THIRD = tl.constexpr(27)
THIRD_BY = tl.constexpr(28)
COLUMNS = tl.constexpr(29)

# Columns of the binding table, int64 [parameters, BINDINGS]: what may differ from step to step.
WEIGHT = tl.constexpr(0)
WEIGHT_STRIDE = tl.constexpr(1)
GRADIENT = tl.constexpr(2)
GRADIENT_STRIDE = tl.constexpr(3)
BINDINGS = tl.constexpr(4)

# Columns of the hyper-parameter table, float64 [groups, KNOBS].
RATE = tl.constexpr(0)  # formulas.learning_rate
BETA1 = tl.constexpr(1)
BETA2 = tl.constexpr(2)
EPS = tl.constexpr(3)
DECAY = tl.constexpr(4)
FRONT = tl.constexpr(5)
GAMMA = tl.constexpr(6)
KNOBS = tl.constexpr(7)

# control, int64: 1 + index of the first bad parameter of this step; the same of the first step nobody was told about.
BAD = tl.constexpr(0)
UNTOLD = tl.constexpr(1)
CONTROLS = tl.constexpr(2)

# statistics, float32 [STATISTICS, parameters]
SQUARES = tl.constexpr(0)  # ||G||^2
FACTOR = tl.constexpr(1)  # what G is multiplied with before it is subtracted
MOVED = tl.constexpr(2)  # squared norm of the update
WRITTEN = tl.constexpr(3)  # 1 if this step has written the parameter
STATISTICS = tl.constexpr(4)

NORM_EPS = tl.constexpr(1e-8)
LIMITER_FLOOR = tl.constexpr(1e-3)
