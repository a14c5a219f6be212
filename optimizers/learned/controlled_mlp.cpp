// One step of ControlledMLP, forward only; the definition is `_plain_step` in controlled_mlp.py.
//
// Tensors lie one behind the other. Of each, one pass takes the memory on and sums up what the
// features are divided by, a second sums up those that need the mean of v, a third computes the
// directions; those of a matrix are made orthogonal, and a last pass scales them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int FEATURES = 12, HIDDEN = 8, TIMES = 5, CONTROLS = 13;
constexpr float DECAYS[3] = {0.5f, 0.9f, 0.99f}, LOSS_DECAYS[2] = {0.9f, 0.98f};
constexpr float SQUARE_DECAY = 0.98f, FIRST_STEP = -4.6f, LARGEST = 8.0f, TINY = 1e-16f;
constexpr float SCHULZ[3] = {3.4445f, -4.7750f, 2.0315f}, LEAST_NORM = 1e-7f;
constexpr int SCHULZ_STEPS = 4;
constexpr int64_t BLOCK = 1024;  // entries that are summed up in float before they join a double

inline float inverse_root(float x) { return 1.0f / std::sqrt(x + TINY); }

struct Theta {
    float direct[FEATURES];
    float feature_weight[HIDDEN][FEATURES];
    float time_weight[HIDDEN][TIMES];
    float direction_weight[HIDDEN];
    float control[CONTROLS];
    float control_weight[HIDDEN][CONTROLS];
    float control_bias[HIDDEN];
    float step_weight[HIDDEN];
};

// Mean squares over a tensor: of g, the three momenta, p, min(1 / sqrt v, 10), then of the first
// four times 1 / sqrt(v / mean v + 1e-4), and of m.9 over the roots of row and column; and mean v.
struct Means {
    double plain[6] = {}, scaled[5] = {}, v = 0;
};

struct Tensors {
    const float *g, *p;
    const float *m_old[3], *v_old;
    float *m[3], *v, *out;
    float *rows, *columns;  // after the step
    std::vector<float> row_factor, column_factor;
    int64_t count, row_count, column_count;
};

struct Time {
    float of_direction[TIMES], of_control[5];

    Time(float t, float steps) {
        float x = std::min(t / steps, 1.0f), length = (std::log(steps) - 5) / 2;
        float begin = 1 - std::tanh(t / (0.05f * steps + 3));
        float first[TIMES] = {1, x, x * x, std::tanh(t / 10), length};
        float second[5] = {1, x, x * x * x * x, begin, length};
        std::copy(first, first + TIMES, of_direction);
        std::copy(second, second + 5, of_control);
    }
};

void advance(Tensors& x, Means& means) {
    for (int64_t start = 0; start < x.count; start += BLOCK) {
        int64_t stop = std::min(start + BLOCK, x.count);
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, sv = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4, s5, sv)
        for (int64_t i = start; i < stop; ++i) {
            float g = x.g[i], p = x.p[i];
            float a = DECAYS[0] * x.m_old[0][i] + (1 - DECAYS[0]) * g;
            float b = DECAYS[1] * x.m_old[1][i] + (1 - DECAYS[1]) * g;
            float c = DECAYS[2] * x.m_old[2][i] + (1 - DECAYS[2]) * g;
            float v = SQUARE_DECAY * x.v_old[i] + (1 - SQUARE_DECAY) * g * g;
            x.m[0][i] = a, x.m[1][i] = b, x.m[2][i] = c, x.v[i] = v;
            float root = std::min(inverse_root(v), 10.0f);
            s0 += g * g, s1 += a * a, s2 += b * b, s3 += c * c, s4 += p * p, s5 += root * root;
            sv += v;
        }
        float sums[6] = {s0, s1, s2, s3, s4, s5};
        for (int k = 0; k < 6; ++k) means.plain[k] += sums[k];
        means.v += sv;
    }
    double scale = 1.0 / std::max<int64_t>(x.count, 1);
    for (double& mean : means.plain) mean *= scale;
    means.v *= scale;
}

// Take the mean squares of rows and columns on. Sums over many entries are made in blocks that
// join doubles.
void take_rows_and_columns(Tensors& x, const float* rows_old, const float* columns_old) {
    int64_t R = x.row_count, C = x.column_count;
    x.row_factor.resize(R), x.column_factor.resize(C);
    std::vector<double> totals(C, 0.0);
    std::vector<float>& sums = x.column_factor;
    for (int64_t first = 0; first < R; first += BLOCK) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t r = first; r < std::min(first + BLOCK, R); ++r) {
            const float* g = x.g + r * C;
            double total = 0;
            for (int64_t start = 0; start < C; start += BLOCK) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t c = start; c < std::min(start + BLOCK, C); ++c) {
                    float square = g[c] * g[c];
                    sum += square, sums[c] += square;
                }
                total += sum;
            }
            float mean = float(total / std::max<int64_t>(C, 1));
            x.rows[r] = SQUARE_DECAY * rows_old[r] + (1 - SQUARE_DECAY) * mean;
            x.row_factor[r] = inverse_root(x.rows[r]);
        }
        for (int64_t c = 0; c < C; ++c) totals[c] += sums[c];
    }
    for (int64_t c = 0; c < C; ++c) {
        float mean = float(totals[c] / std::max<int64_t>(R, 1));
        x.columns[c] = SQUARE_DECAY * columns_old[c] + (1 - SQUARE_DECAY) * mean;
        x.column_factor[c] = inverse_root(x.columns[c]);
    }
}

// Call visit(first entry, entries, factors of the columns or of the rows, the one factor) for runs
// of entries: the rows of a matrix, or all of a column.
template <typename Visit>
void by_run(const Tensors& x, Visit visit) {
    if (x.column_count == 1) {
        visit(int64_t{0}, x.count, x.row_factor.data(), x.column_factor[0]);
        return;
    }
    for (int64_t r = 0; r < x.row_count; ++r)
        visit(r * x.column_count, x.column_count, x.column_factor.data(), x.row_factor[r]);
}

void sum_scaled(const Tensors& x, Means& means) {
    float relative = 1.0f / (float(means.v) + TINY);
    by_run(x, [&](int64_t start, int64_t count, const float* factors, float factor) {
        for (int64_t at = 0; at < count; at += BLOCK) {
            int64_t stop = std::min(at + BLOCK, count);
            float s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4)
            for (int64_t j = at; j < stop; ++j) {
                int64_t i = start + j;
                float square = 1.0f / (x.v[i] * relative + 1e-4f);
                float g = x.g[i], a = x.m[0][i], b = x.m[1][i], c = x.m[2][i];
                float d = b * factors[j] * factor;
                s0 += g * g * square, s1 += a * a * square, s2 += b * b * square;
                s3 += c * c * square, s4 += d * d;
            }
            float sums[5] = {s0, s1, s2, s3, s4};
            for (int k = 0; k < 5; ++k) means.scaled[k] += sums[k];
        }
    });
    for (double& mean : means.scaled) mean /= std::max<int64_t>(x.count, 1);
}

float log_step(const Theta& theta, const Tensors& x, const Means& means, bool is_vector,
               const float* losses, const float* of_control) {
    float first = losses[0], floor = 0.01f * std::fabs(first) + 1e-8f;
    float fast = std::log(std::max(losses[1], 0.0f) + floor);
    float slow = std::log(std::max(losses[2], 0.0f) + floor);
    float start = std::log(std::fabs(first) + floor);
    float spread = std::log(float(means.v) + TINY) / 2;
    float h[CONTROLS] = {
        of_control[0], of_control[1], of_control[2], of_control[3], of_control[4],
        std::log(float(means.plain[4]) + 1e-4f) / 4,
        std::log(float(means.plain[2]) + TINY) / 2 - spread,
        std::log(float(means.plain[3]) + TINY) / 2 - spread,
        std::min(fast - slow, 3.0f), std::min(fast - start, 6.0f) / 2,
        std::log(float(std::max<int64_t>(x.column_count, 1))) / 3,
        std::log(float(std::max<int64_t>(x.row_count, 1))) / 3,
        is_vector ? 1.0f : 0.0f};
    float change = 0;
    for (int k = 0; k < CONTROLS; ++k) change += theta.control[k] * h[k];
    for (int j = 0; j < HIDDEN; ++j) {
        float sum = theta.control_bias[j];
        for (int k = 0; k < CONTROLS; ++k) sum += theta.control_weight[j][k] * h[k];
        change += theta.step_weight[j] * std::tanh(sum);
    }
    return FIRST_STEP + std::min(std::max(2 * change, -LARGEST), LARGEST);
}

using Lane = float __attribute__((vector_size(64), aligned(4)));
constexpr int64_t WIDTH = 16, ROWS = 4;

int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Y = scale Z + B X for four rows and LANES lanes of columns, held in registers.
template <int LANES>
void multiply_block(const float* B, int64_t of_b, const float* X, const float* Z, float scale,
                    int64_t inner, int64_t columns, float* Y) {
    Lane sums[ROWS][LANES] = {};
    for (int64_t k = 0; k < inner; ++k) {
        Lane x[LANES];
        for (int l = 0; l < LANES; ++l)
            x[l] = *reinterpret_cast<const Lane*>(X + k * columns + l * WIDTH);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            float b = B[r * of_b + k];
#pragma GCC unroll 4
            for (int l = 0; l < LANES; ++l) sums[r][l] += b * x[l];
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int l = 0; l < LANES; ++l) {
            int64_t at = r * columns + l * WIDTH;
            Lane sum = sums[r][l];
            if (scale != 0) sum += scale * *reinterpret_cast<const Lane*>(Z + at);
            *reinterpret_cast<Lane*>(Y + at) = sum;
        }
}

// Y = scale Z + B X for B [rows, of_b >= inner], X [inner, columns], and Y and Z [rows, columns];
// rows is a multiple of ROWS, columns of WIDTH. Of a symmetric Y nothing is computed that `mirror`
// makes of the rest, which is half.
void multiply(const float* B, int64_t of_b, const float* X, const float* Z, float scale,
              int64_t rows, int64_t inner, int64_t columns, float* Y, bool symmetric) {
    for (int64_t c = 0; c < columns;) {
        int64_t lanes = columns - c >= 2 * WIDTH ? 2 : 1;
        auto block = lanes == 2 ? multiply_block<2> : multiply_block<1>;
        int64_t last = symmetric ? std::min(rows, c + lanes * WIDTH) : rows;
        for (int64_t i = 0; i < last; i += ROWS) {
            int64_t at = i * columns + c;
            block(B + i * of_b, of_b, X + c, Z + at, scale, inner, columns, Y + at);
        }
        c += lanes * WIDTH;
    }
}

// T = X^T for X [rows, columns], in squares that stay in the cache; both are multiples of WIDTH.
void transpose(const float* X, int64_t rows, int64_t columns, float* T) {
    for (int64_t i = 0; i < rows; i += WIDTH)
        for (int64_t j = 0; j < columns; j += WIDTH)
            for (int64_t b = j; b < j + WIDTH; ++b)
                for (int64_t a = i; a < i + WIDTH; ++a) T[b * rows + a] = X[a * columns + b];
}

// Copy what is above the diagonal of a square matrix to below it; size is a multiple of WIDTH.
void mirror(float* G, int64_t size) {
    for (int64_t i = 0; i < size; i += WIDTH)
        for (int64_t j = 0; j <= i; j += WIDTH)
            for (int64_t a = i; a < i + WIDTH; ++a)
                for (int64_t b = j; b < std::min(j + WIDTH, a); ++b)
                    G[a * size + b] = G[b * size + a];
}

// Replace a matrix [rows, columns] by one whose singular values are near 1, and return the mean of
// its squares: Newton-Schulz steps X = a X + (b G + c G^2) X with G = X X^T. Buffers are padded
// with zeros, which stay zeros.
double orthogonalize(float* out, int64_t rows, int64_t columns, double square) {
    int64_t count = rows * columns, r = std::min(rows, columns), c = std::max(rows, columns);
    int64_t R = padded(r, WIDTH), C = padded(c, WIDTH);
    bool is_tall = rows > columns;
    float norm = std::max(float(std::sqrt(square * double(count))), LEAST_NORM);
    std::vector<float> X(R * C), Y(R * C), T(C * R), G(R * R), B(R * R);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
            X[is_tall ? j * C + i : i * C + j] = out[i * columns + j] / norm;
    int64_t used = padded(r, ROWS);
    for (int step = 0; step < SCHULZ_STEPS; ++step) {
        transpose(X.data(), R, C, T.data());
        multiply(X.data(), C, T.data(), G.data(), 0, used, c, R, G.data(), true);
        mirror(G.data(), R);
        multiply(G.data(), R, G.data(), G.data(), 0, used, r, R, B.data(), true);
        for (int64_t i = 0; i < used * R; ++i) B[i] = SCHULZ[1] * G[i] + SCHULZ[2] * B[i];
        mirror(B.data(), R);
        multiply(B.data(), R, X.data(), X.data(), SCHULZ[0], used, r, C, Y.data(), false);
        X.swap(Y);
    }
    double total = 0;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
            float value = X[is_tall ? j * C + i : i * C + j];
            out[i * columns + j] = value, total += double(value) * value;
        }
    return total / std::max<int64_t>(count, 1);
}

// Write d into x.out and return its mean square.
double direct(const Theta& theta, const Tensors& x, const Means& means, const float* of_direction) {
    float scale[FEATURES];
    for (int k = 0; k < 4; ++k) scale[k] = inverse_root(float(means.plain[k]));
    for (int k = 0; k < 5; ++k) scale[4 + k] = inverse_root(float(means.scaled[k]));
    scale[9] = inverse_root(float(means.plain[4]));
    scale[10] = inverse_root(float(means.plain[5]));
    scale[11] = inverse_root(1.0f);
    float weight[HIDDEN][FEATURES], line[FEATURES], bias[HIDDEN], last[HIDDEN];
    for (int k = 0; k < FEATURES; ++k) line[k] = theta.direct[k] * scale[k];
    for (int j = 0; j < HIDDEN; ++j) {
        last[j] = theta.direction_weight[j];
        bias[j] = theta.feature_weight[j][11] * scale[11];
        for (int k = 0; k < TIMES; ++k) bias[j] += theta.time_weight[j][k] * of_direction[k];
        for (int k = 0; k < FEATURES; ++k) weight[j][k] = theta.feature_weight[j][k] * scale[k];
    }
    float relative = 1.0f / (float(means.v) + TINY);
    double total = 0;
    by_run(x, [&](int64_t start, int64_t count, const float* factors, float factor) {
        for (int64_t at = 0; at < count; at += BLOCK) {
            int64_t stop = std::min(at + BLOCK, count);
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = at; j < stop; ++j) {
                int64_t i = start + j;
                float v = x.v[i], s = 1.0f / std::sqrt(v * relative + 1e-4f);
                float g = x.g[i], a = x.m[0][i], b = x.m[1][i], c = x.m[2][i];
                float f[FEATURES - 1] = {g, a, b, c, g * s, a * s, b * s, c * s,
                                         b * factors[j] * factor, x.p[i],
                                         std::min(inverse_root(v), 10.0f)};
                float d = line[11];
#pragma GCC unroll 12
                for (int k = 0; k < FEATURES - 1; ++k) d += line[k] * f[k];
#pragma GCC unroll 8
                for (int n = 0; n < HIDDEN; ++n) {
                    float hidden = bias[n];
#pragma GCC unroll 12
                    for (int k = 0; k < FEATURES - 1; ++k) hidden += weight[n][k] * f[k];
                    d += last[n] * std::max(hidden, 0.0f);
                }
                x.out[i] = d;
                sum += d * d;
            }
            total += sum;
        }
    });
    return total / std::max<int64_t>(x.count, 1);
}

}  // namespace

// All arrays are contiguous, with a leading axis of `batch`. shapes: (rows, columns, is vector) of
// each tensor; orthogonal: whether matrices are made so. scalars: the loss, the step from 0, and
// the rate. Those behind `scalars` are written.
extern "C" void controlled_step(
    int64_t batch, int64_t tensors, const int64_t* shapes, int64_t orthogonal, double steps,
    int64_t count, int64_t all_rows, int64_t all_columns, const float* theta, const float* g,
    const float* p,
    const float* m_old, const float* v_old, const float* rows_old, const float* columns_old,
    const float* losses_old, const float* scalars, float* out, float* m, float* v, float* rows,
    float* columns, float* losses) {
    static_assert(sizeof(Theta) == 289 * sizeof(float), "the weights lie one behind the other");
    for (int64_t b = 0; b < batch; ++b) {
        const Theta& weights = reinterpret_cast<const Theta*>(theta)[b];
        const float* scalar = scalars + 3 * b;
        float loss = scalar[0], t = scalar[1], rate = scalar[2];
        Time time(t, float(steps));
        float* seen = losses + 3 * b;
        seen[0] = t == 0 ? loss : losses_old[3 * b];
        for (int k = 0; k < 2; ++k) {
            float decay = t == 0 ? 0.0f : LOSS_DECAYS[k];
            float before = t == 0 ? 0.0f : decay * losses_old[3 * b + 1 + k];
            seen[1 + k] = before + (1 - decay) * loss;
        }
        int64_t start = 0, row = b * all_rows, column = b * all_columns;
        for (int64_t tensor = 0; tensor < tensors; ++tensor) {
            Tensors x;
            const int64_t* shape = shapes + 3 * tensor;
            x.row_count = shape[0], x.column_count = shape[1];
            x.count = x.row_count * x.column_count;
            int64_t at = b * count + start, of_momenta = 3 * b * count + start;
            x.g = g + at, x.p = p + at, x.v_old = v_old + at, x.v = v + at, x.out = out + at;
            for (int k = 0; k < 3; ++k) {
                x.m_old[k] = m_old + of_momenta + k * count;
                x.m[k] = m + of_momenta + k * count;
            }
            x.rows = rows + row, x.columns = columns + column;
            Means means;
            advance(x, means);
            take_rows_and_columns(x, rows_old + row, columns_old + column);
            sum_scaled(x, means);
            double square = direct(weights, x, means, time.of_direction);
            if (orthogonal && shape[2] == 0)
                square = orthogonalize(x.out, x.row_count, x.column_count, square);
            float step =
                std::exp(log_step(weights, x, means, shape[2] != 0, seen, time.of_control));
            float factor = -rate * step * inverse_root(float(square));
            for (int64_t i = 0; i < x.count; ++i) x.out[i] *= factor;
            start += x.count, row += x.row_count, column += x.column_count;
        }
    }
}
