// 3×3 convolutions with fewer multiplications: F(4×4, 3×3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks" (2015), at points that err less than the usual ones. engine.py says what is computed.
//
// Maps are NHWC in float32. Around each image lies a border of zeros, and as many more right and below as tiles of 4×4
// need to cover it. A block of tiles is transformed, multiplied with the transformed weights position by position, and
// transformed back with bias, shortcut and ReLU, while all of it is in the second-level cache.

#include "../native/crew.hpp"
#include "../native/product.hpp"

constexpr int TILE = 4, SIDE = TILE + 2, POSITIONS = SIDE * SIDE;

struct Map {
  float* data;
  int height, width;  // of an image
  int lines, pitch;   // with what lies around it
  int channels;
  float* at(int image, int y, int x) const {  // -1 is the border
    return data + ((static_cast<ptrdiff_t>(image) * lines + y + 1) * pitch + x + 1) * channels;
  }
};

struct Step {  // one convolution, padded to keep the size where its stride is 1
  Map from, to, shortcut;  // shortcut: added before the ReLU; its data may be null
  const float *weights, *bias;
  int kernel, stride, rectify;
  int block;  // tiles that are transformed together; 0: no tiles, computed directly
};

static void as_is(Columns<WIDE>, float*, int) {}

// Bias, shortcut and ReLU of one pixel's channels from `c` on.
static inline Vector finished(const Step& step, Vector value, const float* add, int c) {
  value += load(step.bias + c);
  if (add) value += load(add + c);
  return step.rectify ? relu(value) : value;
}

static void direct(const Step& step, int images) {
  const Map &from = step.from, &to = step.to;
  const int taps = step.kernel * step.kernel, corner = -(step.kernel / 2);
  ptrdiff_t offsets[9];
  for (int tap = 0; tap < taps; tap++)
    offsets[tap] = from.at(0, tap / step.kernel, tap % step.kernel) - from.at(0, 0, 0);
  for (int image = 0; image < images; image++)
    for (int panel = 0; panel < to.channels; panel += PANEL) {
      const float* weights = step.weights + static_cast<ptrdiff_t>(panel) * taps * from.channels;
      for (int y = 0; y < to.height; y++) {
        const float* row = from.at(image, y * step.stride + corner, corner);
        const Left a{row, static_cast<ptrdiff_t>(step.stride) * from.channels, offsets, taps, from.channels};
        float* target = to.at(image, y, 0) + panel;
        multiply_rows<WIDE>(to.width, a, Right{weights, PANEL}, Result{target, to.channels}, as_is);
        const float* add = step.shortcut.data ? step.shortcut.at(image, y, 0) : nullptr;
        for (int x = 0; x < to.width; x++, target += to.channels, add = add ? add + to.channels : nullptr)
          for (int c = 0; c < PANEL; c += LANES)
            store(target + c, finished(step, load(target + c), add, panel + c));
      }
    }
}

// Of the points 0, ±A, ±B and infinity. The usual 1 and 2 give four times the error (Barabasz and others, "Error Analysis
// and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", 2020, choose points so); these are small
// binary fractions, so that no entry is rounded. packing.py makes the weights with the G that belongs to them.
constexpr float A = 11.0f / 16, B = 3.0f / 2, AA = A * A, BB = B * B;
static constexpr float BT[SIDE][SIDE] = {{AA * BB, 0, -AA - BB, 0, 1, 0}, {0, -A * BB, -BB, A, 1, 0},
                                         {0, A * BB, -BB, -A, 1, 0},      {0, -AA * B, -AA, B, 1, 0},
                                         {0, AA * B, -AA, -B, 1, 0},      {0, AA * BB, 0, -AA - BB, 0, 1}};
static constexpr float AT[TILE][SIDE] = {
    {1, 1, 1, 1, 1, 0}, {0, A, -A, B, -B, 0}, {0, AA, AA, BB, BB, 0}, {0, A * AA, -A * AA, B * BB, -B * BB, 1}};

// y = matrix · x, the zeros of the matrix left out.
template <int OUT>
static inline __attribute__((always_inline)) void transform(const float (&matrix)[OUT][SIDE], const Vector (&x)[SIDE],
                                                            Vector (&y)[OUT]) {
#pragma GCC unroll 8
  for (int i = 0; i < OUT; i++) {
    y[i] = Vector{};
    bool empty = true;
#pragma GCC unroll 8
    for (int k = 0; k < SIDE; k++) {
      if (matrix[i][k] == 0) continue;
      const Vector term = matrix[i][k] == 1 ? x[k] : matrix[i][k] * x[k];
      y[i] = empty ? term : matrix[i][k] == 1 ? y[i] + x[k] : y[i] + matrix[i][k] * x[k];
      empty = false;
    }
  }
}

struct Tiles {  // of all images, row by row
  int across, down;
  explicit Tiles(const Map& map) : across((map.width + TILE - 1) / TILE), down((map.height + TILE - 1) / TILE) {}
  int of_image() const { return across * down; }
  int image(int tile) const { return tile / of_image(); }
  int top(int tile) const { return tile % of_image() / across * TILE; }
  int left(int tile) const { return tile % across * TILE; }
};

static void tiles_in(const Map& from, const Tiles& tiles, int first, int count, float* v, ptrdiff_t v_step) {
  for (int t = 0; t < count; t++) {
    const int tile = first + t;
    const float* source = from.at(tiles.image(tile), tiles.top(tile) - 1, tiles.left(tile) - 1);
    for (int c = 0; c < from.channels; c += LANES) {
      Vector half[SIDE][SIDE], x[SIDE], y[SIDE];
      for (int column = 0; column < SIDE; column++) {
        for (int k = 0; k < SIDE; k++)
          x[k] = load(source + (static_cast<ptrdiff_t>(k) * from.pitch + column) * from.channels + c);
        transform(BT, x, half[column]);
      }
      for (int row = 0; row < SIDE; row++) {
        for (int k = 0; k < SIDE; k++) x[k] = half[k][row];
        transform(BT, x, y);
        for (int k = 0; k < SIDE; k++)
          store(v + (row * SIDE + k) * v_step + static_cast<ptrdiff_t>(t) * from.channels + c, y[k]);
      }
    }
  }
}

static void tiles_out(const Step& step, const Tiles& tiles, int first, int count, const float* m, ptrdiff_t m_step) {
  const Map& to = step.to;
  for (int t = 0; t < count; t++) {
    const int tile = first + t, image = tiles.image(tile), top = tiles.top(tile), left = tiles.left(tile);
    // What lies beyond the image must stay zero.
    const int high = std::min(TILE, to.height - top), wide = std::min(TILE, to.width - left);
    float* target = to.at(image, top, left);
    const float* shortcut = step.shortcut.data ? step.shortcut.at(image, top, left) : nullptr;
    for (int c = 0; c < to.channels; c += LANES) {
      Vector half[SIDE][TILE], x[SIDE], y[TILE];
      for (int column = 0; column < SIDE; column++) {
        for (int k = 0; k < SIDE; k++)
          x[k] = load(m + (k * SIDE + column) * m_step + static_cast<ptrdiff_t>(t) * to.channels + c);
        transform(AT, x, half[column]);
      }
      for (int row = 0; row < high; row++) {
        for (int k = 0; k < SIDE; k++) x[k] = half[k][row];
        transform(AT, x, y);
        for (int k = 0; k < wide; k++) {
          const ptrdiff_t at = (static_cast<ptrdiff_t>(row) * to.pitch + k) * to.channels;
          store(target + at + c, finished(step, y[k], shortcut ? shortcut + at : nullptr, c));
        }
      }
    }
  }
}

// `scratch` holds two blocks of transformed tiles: POSITIONS · (block · channels + LANES) numbers each.
static void by_tiles(const Step& step, int images, float* scratch) {
  const Tiles tiles(step.to);
  const int count = tiles.of_image() * images, in = step.from.channels, out = step.to.channels;
  // A line more for each, or all positions of a tile would want the same places of the first-level cache.
  const ptrdiff_t v_step = static_cast<ptrdiff_t>(step.block) * in + LANES;
  const ptrdiff_t m_step = static_cast<ptrdiff_t>(step.block) * out + LANES;
  float *v = scratch, *m = scratch + POSITIONS * v_step;
  const ptrdiff_t none = 0;
  for (int first = 0; first < count; first += step.block) {
    const int now = std::min(step.block, count - first);
    tiles_in(step.from, tiles, first, now, v, v_step);
    for (int position = 0; position < POSITIONS; position++)
      for (int panel = 0; panel < out; panel += PANEL) {
        const Left a{v + position * v_step, in, &none, 1, in};
        const float* weights = step.weights + (static_cast<ptrdiff_t>(position) * out + panel) * in;
        multiply_rows<WIDE>(now, a, Right{weights, PANEL}, Result{m + position * m_step + panel, out}, as_is);
      }
    tiles_out(step, tiles, first, now, m, m_step);
  }
}

// Images as they come, channel by channel, into a map, and back.
static void pack(const float* images, const Map& to, int count) {
  for (int image = 0; image < count; image++)
    for (int c = 0; c < to.channels; c++)
      for (int y = 0; y < to.height; y++) {
        float* row = to.at(image, y, 0) + c;
        for (int x = 0; x < to.width; x++) row[static_cast<ptrdiff_t>(x) * to.channels] = *images++;
      }
}

static void unpack(const Map& from, int count, float* images) {
  for (int image = 0; image < count; image++)
    for (int c = 0; c < from.channels; c++)
      for (int y = 0; y < from.height; y++) {
        const float* row = from.at(image, y, 0) + c;
        for (int x = 0; x < from.width; x++) *images++ = row[static_cast<ptrdiff_t>(x) * from.channels];
      }
}

struct Member {  // of a crew: what it computes, on maps of its own
  const Step* steps;
  float* scratch;
};

// Convolves `count` images, `group` at a time, from the first step's map to the last one's; NCHW both.
extern "C" void run(const Member* members, int length, const float* images, int count, int group, float* results,
                    void* crew) {
  const Denormals zero;
  static_cast<Crew*>(crew)->share((count + group - 1) / group, [&](int part, int which) {
    const Step* const steps = members[which].steps;
    const Map &first = steps[0].from, &last = steps[length - 1].to;
    const ptrdiff_t in = static_cast<ptrdiff_t>(first.channels) * first.height * first.width;
    const ptrdiff_t out = static_cast<ptrdiff_t>(last.channels) * last.height * last.width;
    const int done = part * group, now = std::min(group, count - done);
    pack(images + done * in, first, now);
    for (int i = 0; i < length; i++) {
      if (steps[i].block)
        by_tiles(steps[i], now, members[which].scratch);
      else
        direct(steps[i], now);
    }
    unpack(last, now, results + done * out);
  });
}
