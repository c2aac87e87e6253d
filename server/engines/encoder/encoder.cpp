// Blocks of transformer encoders: self-attention, feed-forward networks and layer normalisation, [rows, length, width] in
// float32. steps.py says which. A few rows go through all steps together, so that their values stay in the second-level
// cache; what follows a product (bias, activation, sum) is done while its results are in the first-level one.

#include <cmath>
#include <cstdint>
#include <limits>

#include "../native/crew.hpp"
#include "../native/product.hpp"

typedef int32_t Integers __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline Vector all(float value) { return Vector{} + value; }
// The numbers of a vector four by four, which are summed up or compared as such.
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

static inline float total(Vector value) {
  const Four* parts = reinterpret_cast<const Four*>(&value);
  Four sum = parts[0];
  for (int i = 1; i < LANES / 4; i++) sum += parts[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
static inline float largest(Vector value) {
  const Four* parts = reinterpret_cast<const Four*>(&value);
  Four most = parts[0];
  for (int i = 1; i < LANES / 4; i++) most = parts[i] > most ? parts[i] : most;
  return std::max(std::max(most[0], most[1]), std::max(most[2], most[3]));
}

// e to the power of x, for x up to 0: 2^n · e^r, r at most half of the logarithm of 2 away from 0. Cody and Waite, "Software
// Manual for the Elementary Functions" (1980); the polynomial is Taylor's, off by 2e-7 of the result at most.
static inline Vector exponential(Vector x) {
  constexpr float ROUND = 3 << 22;                          // added, it leaves no bit for a fraction
  constexpr float LN2 = 0.693145752f, REST = 1.42860677e-6f;  // of few bits, so that n times it is exact; and the rest
  x = x < -87.0f ? all(-87.0f) : x;
  const Vector shifted = x * 1.44269504f + ROUND, n = shifted - ROUND, r = x - n * LN2 - n * REST;
  const Vector sum = (((((r * (1.0f / 720) + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6) * r + 0.5f) * r + 1) * r + 1;
  const Integers power = (reinterpret_cast<Integers>(shifted) << 23) + (127 << 23);
  return sum * reinterpret_cast<Vector>(power);
}

// erf(x) = x · p(2x²/LIMIT² - 1) up to LIMIT, where it is 1 but for 4e-8. The polynomial p has about the least largest error
// of its degree, 8e-8: fitted by Lawson's algorithm ("Contributions to the theory of linear least maximum
// approximation", 1961), as the tests do again.
constexpr float LIMIT = 3.9f;
constexpr int TERMS = 15;
constexpr float ERF[TERMS] = {0.00159607445f, -0.00404268651f, 0.00296095846f, -0.00347950149f, 0.0122482913f,
                         -0.022151858f,  0.0299631423f,   -0.0417854656f, 0.057643962f,    -0.0739973329f,
                         0.0907090274f,  -0.109515766f,   0.134688925f,   -0.181011493f,   0.362583992f};

// Of several at once: each step of the polynomial waits for the one before.
template <int W>
static inline void gelu(Vector (&x)[W]) {
  Vector z[W], s[W], sum[W];
  for (int w = 0; w < W; w++) {
    z[w] = x[w] * 0.707106781f;
    z[w] = z[w] > LIMIT ? all(LIMIT) : z[w] < -LIMIT ? all(-LIMIT) : z[w];
    s[w] = z[w] * z[w] * (2 / (LIMIT * LIMIT)) - 1.0f;
    sum[w] = all(ERF[0]);
  }
#pragma GCC unroll 16
  for (int i = 1; i < TERMS; i++)
    for (int w = 0; w < W; w++) sum[w] = sum[w] * s[w] + ERF[i];
  for (int w = 0; w < W; w++) {
    Vector erf = sum[w] * z[w];  // not beyond 1, or a large x would show by how much
    erf = erf > 1.0f ? all(1) : erf < -1.0f ? all(-1) : erf;
    const Vector half = x[w] * 0.5f;
    x[w] = half * erf + half;
  }
}

enum Kind { LINEAR, NORM, ATTENTION };
enum Activation { NONE, RELU, GELU };

struct Step {
  int kind, activation;
  int source, target, addend;   // places; addend: added last, or -1
  int in, out;                  // numbers a token; of attention, the queries, keys and values of a token are `in` together
  int heads;                    // of attention
  int mask, factor;             // of attention: sides with what is attended to, and what the results are multiplied by; or -1
  float number, hidden;         // the epsilon of a norm; the scale of scores, and what is added to hidden ones
  const float *weights, *bias;  // of a product, in panels; of a norm
};

struct Plan {
  const Step* steps;
  int count;
  const ptrdiff_t* places;  // numbers a token before each place in a member's memory
  ptrdiff_t width;          // numbers a token of all
};

// Place 0 is the input, 1 the output.
struct Batch {
  const float* input;
  float* output;
  int in, out;              // numbers a token
  const void* const* sides;  // [rows, length] of int32, or [rows] of float32
  int rows, length, group;  // so many rows go through all steps together
  float* memory;
  ptrdiff_t each;  // numbers of it for each member of the crew
};

static void product(const Step& step, const float* x, float* y, const float* add, int tokens) {
  const ptrdiff_t none = 0;
  const Left left{x, step.in, &none, 1, step.in};
  for (int at = 0; at < step.out; at += PANEL) {
    const int width = std::min(PANEL, step.out - at);
    const auto finish = [&](auto columns, float* results, int rows) {
      constexpr int W = columns.vectors;
      Vector bias[W];
      for (int w = 0; w < W; w++) bias[w] = load(step.bias + at + w * LANES);
      for (int row = 0; row < rows; row++, results += step.out) {
        Vector value[W];
        for (int w = 0; w < W; w++) value[w] = load(results + w * LANES) + bias[w];
        if (step.activation == RELU)
          for (int w = 0; w < W; w++) value[w] = relu(value[w]);
        if (step.activation == GELU) gelu(value);
        if (add)
          for (int w = 0; w < W; w++) value[w] += load(add + (results - y) + w * LANES);
        for (int w = 0; w < W; w++) store(results + w * LANES, value[w]);
      }
    };
    const Right right{step.weights + static_cast<ptrdiff_t>(at) * step.in, width};
    multiply_columns(width, tokens, left, right, Result{y + at, step.out}, finish);
  }
}

static void norm(const Step& step, const float* x, float* y, int tokens) {
  const int width = step.in;
  for (int token = 0; token < tokens; token++, x += width, y += width) {
    Vector sum{}, squares{};
    for (int i = 0; i < width; i += LANES) sum += load(x + i);
    const float mean = total(sum) / width;
    for (int i = 0; i < width; i += LANES) {
      const Vector off = load(x + i) - mean;
      squares += off * off;
    }
    const float scale = 1 / std::sqrt(total(squares) / width + step.number);
    for (int i = 0; i < width; i += LANES)
      store(y + i, (load(x + i) - mean) * scale * load(step.weights + i) + load(step.bias + i));
  }
}

constexpr int QUERIES = 48;  // that are computed together: their scores stay in the first-level cache

static int padded(int length) { return (length + LANES - 1) / LANES * LANES; }

// Turns scores into weights that are yet to be multiplied by `parts`.
static void soften(const Step& step, float* scores, const float* hide, int rows, int pitch, float factor, float* parts) {
  for (int row = 0; row < rows; row++, scores += pitch) {
    Vector most = all(-std::numeric_limits<float>::infinity()), sum{};
    for (int i = 0; i < pitch; i += LANES) {
      const Vector score = load(scores + i) * step.number + load(hide + i);
      store(scores + i, score);
      most = score > most ? score : most;
    }
    const float top = largest(most);
    for (int i = 0; i < pitch; i += LANES) {
      const Vector weight = exponential(load(scores + i) - top);
      store(scores + i, weight);
      sum += weight;
    }
    parts[row] = factor / total(sum);
  }
}

// Softmax(q · k · scale + hide) · v of one row, head by head. `memory` holds padded(length) · (head + 1 + QUERIES) +
// QUERIES numbers.
static void attention(const Step& step, const float* source, float* y, const int32_t* mask, float factor, int length,
                      float* memory) {
  const int size = step.out / step.heads, pitch = padded(length);
  const ptrdiff_t none = 0;
  float *keys = memory, *hide = keys + static_cast<ptrdiff_t>(size) * pitch, *parts = hide + pitch;
  float* scores = parts + QUERIES;
  for (int i = 0; i < pitch; i++)
    hide[i] = i >= length ? -std::numeric_limits<float>::infinity() : mask && mask[i] <= 0 ? step.hidden : 0;
  for (int i = 0; i < size; i++)  // what an earlier batch left there may not be a number, and stay so when it is hidden
    std::fill(keys + static_cast<ptrdiff_t>(i) * pitch + length, keys + static_cast<ptrdiff_t>(i + 1) * pitch, 0.0f);
  for (int head = 0; head < step.heads; head++, source += size, y += size) {
    for (int token = 0; token < length; token++)
      for (int i = 0; i < size; i++)
        keys[static_cast<ptrdiff_t>(i) * pitch + token] = source[static_cast<ptrdiff_t>(token) * step.in + step.out + i];
    for (int first = 0; first < length; first += QUERIES) {
      const int now = std::min(QUERIES, length - first);
      const Left queries{source + static_cast<ptrdiff_t>(first) * step.in, step.in, &none, 1, size};
      for (int at = 0; at < pitch; at += PANEL)
        multiply_columns(std::min(PANEL, pitch - at), now, queries, Right{keys + at, pitch}, Result{scores + at, pitch},
                         [](auto, float*, int) {});
      soften(step, scores, hide, now, pitch, factor, parts);
      float* results = y + static_cast<ptrdiff_t>(first) * step.out;
      for (int at = 0; at < size; at += PANEL) {
        const float* part = parts;
        const auto finish = [&](auto columns, float* result, int rows) {
          for (int row = 0; row < rows; row++, result += step.out, part++)
            for (int w = 0; w < columns.vectors; w++) store(result + w * LANES, load(result + w * LANES) * *part);
        };
        multiply_columns(std::min(PANEL, size - at), now, Left{scores, pitch, &none, 1, length}, Right{source + 2 * step.out + at, step.in},
                         Result{results + at, step.out}, finish);
      }
    }
  }
}

static void rows_of(const Plan& plan, const Batch& batch, int first, int rows, float* memory) {
  const int length = batch.length, tokens = rows * length;
  const auto place = [&](int which) {
    const ptrdiff_t token = static_cast<ptrdiff_t>(first) * length;
    if (which == 0) return const_cast<float*>(batch.input) + token * batch.in;
    if (which == 1) return batch.output + token * batch.out;
    return memory + plan.places[which] * tokens;
  };
  for (int at = 0; at < plan.count; at++) {
    const Step& step = plan.steps[at];
    const float *x = place(step.source), *add = step.addend < 0 ? nullptr : place(step.addend);
    float* y = place(step.target);
    if (step.kind == LINEAR) product(step, x, y, add, tokens);
    if (step.kind == NORM) norm(step, x, y, tokens);
    for (int row = 0; step.kind == ATTENTION && row < rows; row++, x += length * step.in, y += length * step.out) {
      const void* const mask = step.mask < 0 ? nullptr : batch.sides[step.mask];
      const void* const factor = step.factor < 0 ? nullptr : batch.sides[step.factor];
      attention(step, x, y, mask ? static_cast<const int32_t*>(mask) + static_cast<ptrdiff_t>(first + row) * length : nullptr,
                factor ? static_cast<const float*>(factor)[first + row] : 1, length, memory + plan.width * tokens);
    }
  }
}

// Runs all steps on the rows of `batch`, `group` at a time.
extern "C" void run(const Plan* plan, const Batch* batch, void* crew) {
  const Denormals zero;
  const int parts = (batch->rows + batch->group - 1) / batch->group;
  static_cast<Crew*>(crew)->share(parts, [&](int part, int member) {
    const int first = part * batch->group;
    rows_of(*plan, *batch, first, std::min(batch->group, batch->rows - first), batch->memory + member * batch->each);
  });
}
