// CPU kernels for decoding: matrix products with few rows of activations, and attention with one query per head.
//
// Both are bound by reading weights, keys and values from memory. A matrix is therefore read once, sequentially, by
// all threads, and a few rows cost as much as one. cpu_kernels.py compiles this file for the local processor.
//
// Layout: a matrix (n, m) is packed in groups of 32 rows: 4 bytes of each row (1 float32, 2 bfloat16 or 4 int8), then
// the next 4 bytes of each, and so on. 4 bytes of activations are multiplied with those of all 32 rows at once. Each
// sum has its own SIMD lane and a fixed order, so results are bitwise independent of the rest of the batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

// Vectors of one AVX-512 or AVX2 register: GCC compiles wider ones to code of half the speed. (With SSE or NEON, where
// this is not tuned, LANES is twice a register.)
#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
using floats = float __attribute__((vector_size(4 * LANES)));
using ints = int32_t __attribute__((vector_size(4 * LANES)));
using words = uint32_t __attribute__((vector_size(4 * LANES)));

template <class V> static inline V load(const void *from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

struct Float32 {
    using Sums = floats;
    static Sums add(Sums sums, words w, words x) { return sums + (floats)w * (floats)x; }
};

// Split pairs of bfloat16 into float32: even-numbered (lower halves) and odd-numbered elements (upper halves).
static inline floats even(words pairs) { return (floats)(pairs << 16); }
static inline floats odd(words pairs) { return (floats)(pairs & 0xffff0000u); }

struct BFloat16 {  // two per lane
    using Sums = floats;
    static Sums add(Sums sums, words w, words x) {
#ifdef __AVX512BF16__
        return (Sums)_mm512_dpbf16_ps((__m512)sums, (__m512bh)w, (__m512bh)x);
#else
        sums += even(w) * even(x);
        return sums + odd(w) * odd(x);
#endif
    }
};

struct Int8 {  // four per lane: weights w in -127 ... 127, activation digits x with an offset of 64, 1 ... 127
    using Sums = ints;
    static Sums add(Sums sums, words w, words x) {
#ifdef __AVX512VNNI__
        return (Sums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, (__m512i)w);
#elif defined(__AVX2__) && !defined(__AVX512F__)
        // the 16-bit sums of two products do not saturate: at most 2 * 127 * 127
        __m256i pairs = _mm256_maddubs_epi16((__m256i)x, (__m256i)w);
        return sums + (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
        for (int shift = 24; shift >= 0; shift -= 8)
            sums += ((ints)(w << shift) >> 24) * (ints)((x << shift) >> 24);
        return sums;
#endif
    }
};

// Return whether the work (multiply-adds) is worth waking the thread pool, which takes a few us.
static bool wakes(int threads, long numbers) { return threads > 1 && numbers >= 1 << 16; }

constexpr long GROUP = 32, DEEPEST = 8;  // tile size: rows of weights, maximum rows of activations
constexpr long AHEAD = 8192;  // bytes to prefetch: hardware alone does not hide the latency behind the products

// Dot products of one group of weight rows and DEEP rows of activations, each row having 4 * `steps` bytes.
template <class Format, int DEEP, class T>
static inline void tile(const char *w, const char *x, long steps, T sums[DEEPEST][GROUP]) {
    constexpr int VECTORS = GROUP / LANES;
    typename Format::Sums lanes[DEEP][VECTORS] = {};
    for (long k = 0; k < steps; k++) {
        for (int line = 0; line < 128; line += 64) __builtin_prefetch(w + 128 * k + AHEAD + line);
        words four[VECTORS];  // 4 bytes of each row
        for (int v = 0; v < VECTORS; v++) four[v] = load<words>(w + 128 * k + 4 * LANES * v);
        for (int j = 0; j < DEEP; j++) {
            words here = words{} + load<uint32_t>(x + 4 * (j * steps + k));
            for (int v = 0; v < VECTORS; v++) lanes[j][v] = Format::add(lanes[j][v], four[v], here);
        }
    }
    std::memcpy(sums, lanes, sizeof lanes);
}

template <class Format, class T>
static void tiles(int deep, const char *w, const char *x, long steps, T sums[DEEPEST][GROUP]) {
    switch (deep) {
        case 1: return tile<Format, 1>(w, x, steps, sums);
        case 2: return tile<Format, 2>(w, x, steps, sums);
        case 3: return tile<Format, 3>(w, x, steps, sums);
        case 4: return tile<Format, 4>(w, x, steps, sums);
        case 5: return tile<Format, 5>(w, x, steps, sums);
        case 6: return tile<Format, 6>(w, x, steps, sums);
        case 7: return tile<Format, 7>(w, x, steps, sums);
        default: return tile<Format, 8>(w, x, steps, sums);
    }
}

// Dot products of n weight rows and `rows` activation rows, tile by tile: keep(i, wide, j, deep, sums) receives those
// of `wide` weight rows from i and `deep` activation rows from j. Must be called by all threads of an OpenMP team.
template <class Format, class T, class Keep>
static void product(const void *w, long n, const void *x, long rows, long steps, Keep keep) {
#pragma omp for schedule(static)
    for (long group = 0; group < (n + GROUP - 1) / GROUP; group++) {
        long i = group * GROUP, wide = n - i < GROUP ? n - i : GROUP;
        for (long j = 0; j < rows; j += DEEPEST) {
            long deep = rows - j < DEEPEST ? rows - j : DEEPEST;
            T sums[DEEPEST][GROUP];
            tiles<Format>(deep, (const char *)w + 4 * i * steps, (const char *)x + 4 * j * steps, steps, sums);
            keep(i, wide, j, deep, sums);
        }
    }
}

static inline uint16_t to_bfloat16(float value) {  // round to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

static inline float from_bfloat16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Quantize m activations to two 7-bit digits each, with an offset of 64; return the scale of the first digit, NaN if
// an activation is not finite.
static float to_digits(const float *x, long m, uint8_t *digits) {
    uint32_t bits = 0;  // of the largest magnitude: those of floats are ordered as integers, NaN last
    for (long k = 0; k < m; k++) {
        uint32_t one;
        std::memcpy(&one, x + k, 4);
        bits = std::max(bits, one & 0x7fffffffu);
    }
    float largest;
    std::memcpy(&largest, &bits, 4);
    if (!std::isfinite(largest)) {
        std::memset(digits, 64, 2 * m);
        return NAN;
    }
    float unit = std::max(largest, 1e-30f) / 63;
    for (long k = 0; k < m; k++) {
        float value = x[k] / unit, high = std::nearbyint(value);
        digits[k] = (int)high + 64;
        digits[m + k] = (int)std::nearbyint((value - high) * 126) + 64;
    }
    return unit;
}

// Cache element types: split() converts a vector of keys or values to ROWS vectors of floats.
struct Single {
    using Number = float;
    enum { ROWS = 1 };
    static void split(words from, floats to[]) { to[0] = (floats)from; }
    static float number(float value) { return value; }
    static float rounded(float value) { return value; }
};

struct Half {  // bfloat16
    using Number = uint16_t;
    enum { ROWS = 2 };
    static void split(words from, floats to[]) {
        to[0] = even(from);
        to[1] = odd(from);
    }
    static float number(uint16_t value) { return from_bfloat16(value); }
    static uint16_t rounded(float value) { return to_bfloat16(value); }
};

static inline float total(const float v[16]) {
    using eight = float __attribute__((vector_size(32)));
    using four = float __attribute__((vector_size(16)));
    eight sum = load<eight>(v) + load<eight>(v + 8);
    four rest = load<four>(&sum) + load<four>((char *)&sum + 16);
    return (rest[0] + rest[2]) + (rest[1] + rest[3]);
}

// Attention output y (size) of one query (size) over keys and values (length, size); `weights` (length) is scratch.
template <class Kind, class T = typename Kind::Number>
static void attend_one(const T *query, const T *keys, const T *values, long length, int size, float *weights, T *y) {
    enum { MOST = 16 };  // times 16 floats: head sizes up to 256
    constexpr int ROWS = Kind::ROWS, WIDTH = 16 * ROWS, PARTS = 16 / LANES;
    floats q[MOST][PARTS], sums[MOST][PARTS] = {}, here[ROWS];
    auto place = [](floats(*of)[PARTS], int i) { return (float *)of[i / WIDTH * ROWS + i % ROWS] + i % WIDTH / ROWS; };
    for (int i = 0; i < size; i++) *place(q, i) = Kind::number(query[i]);
    float scale = 1 / std::sqrt((float)size), largest = -INFINITY, sum = 0;
    for (long t = 0; t < length; t++) {
        floats lanes[PARTS] = {};
        for (int i = 0; i < size / WIDTH; i++)
            for (int p = 0; p < PARTS; p++) {
                Kind::split(load<words>(keys + t * size + i * WIDTH + p * LANES * ROWS), here);
                for (int r = 0; r < ROWS; r++) lanes[p] += q[i * ROWS + r][p] * here[r];
            }
        weights[t] = total((float *)lanes) * scale;
        largest = weights[t] > largest ? weights[t] : largest;
    }
    for (long t = 0; t < length; t++) sum += weights[t] = std::exp(weights[t] - largest);
    for (long t = 0; t < length; t++)
        for (int i = 0; i < size / WIDTH; i++)
            for (int p = 0; p < PARTS; p++) {
                Kind::split(load<words>(values + t * size + i * WIDTH + p * LANES * ROWS), here);
                for (int r = 0; r < ROWS; r++) sums[i * ROWS + r][p] += weights[t] * here[r];
            }
    for (int i = 0; i < size; i++) y[i] = Kind::rounded(*place(sums, i) / sum);
}

// Implementation of attend_float32 and attend_bfloat16 below.
template <class Kind, class T = typename Kind::Number>
static void attend(const T *q, long q_row, const T *k, const T *v, long kv_row, T *keys, T *values, long slot,
                   long head, const int64_t *lengths, int texts, int kv_heads, int group, int size, T *y,
                   int threads) {
    long numbers = 0;
    for (int text = 0; text < texts; text++) numbers += lengths[text] * kv_heads * size;
#pragma omp parallel for num_threads(threads) if (wakes(threads, 2 * numbers * group)) schedule(dynamic)
    for (int task = 0; task < texts * kv_heads; task++) {
        int text = task / kv_heads, which = task % kv_heads;
        long length = lengths[text], from = text * slot + which * head, own = text * kv_row + which * size;
        std::vector<float> weights(length);
        std::memcpy(keys + from + (length - 1) * size, k + own, size * sizeof(T));
        std::memcpy(values + from + (length - 1) * size, v + own, size * sizeof(T));
        for (int g = which * group; g < (which + 1) * group; g++)
            attend_one<Kind>(q + text * q_row + g * size, keys + from, values + from, length, size, weights.data(),
                             y + ((long)text * kv_heads * group + g) * size);
    }
}

extern "C" {

// y (rows, n) = x (rows, m) times the transpose of w (n, m), plus bias (n) if not null.
void product_float32(const float *w, const float *bias, long n, long m, const float *x, long rows, float *y,
                     int threads) {
#pragma omp parallel num_threads(threads) if (wakes(threads, rows * n * m))
    product<Float32, float>(w, n, x, rows, m, [=](long i, long wide, long j, long deep, float sums[][GROUP]) {
        for (long b = 0; b < deep; b++)
            for (long a = 0; a < wide; a++) y[(j + b) * n + i + a] = sums[b][a] + (bias ? bias[i + a] : 0);
    });
}

void product_bfloat16(const uint16_t *w, const uint16_t *bias, long n, long m, const uint16_t *x, long rows,
                      uint16_t *y, int threads) {
#pragma omp parallel num_threads(threads) if (wakes(threads, rows * n * m))
    product<BFloat16, float>(w, n, x, rows, m / 2, [=](long i, long wide, long j, long deep, float sums[][GROUP]) {
        for (long b = 0; b < deep; b++)
            for (long a = 0; a < wide; a++)
                y[(j + b) * n + i + a] = to_bfloat16(sums[b][a] + (bias ? from_bfloat16(bias[i + a]) : 0));
    });
}

// As above with int8 weights: row i has the scale step[i] and the sum whole[i], which corrects the digit offset.
// Activations are quantized per row as max |x| / 63 * (high + low / 126), high and low being 7-bit integers.
void product_int8(const int8_t *w, const float *step, const int32_t *whole, const float *bias, long n, long m,
                  const float *x, long rows, float *y, int threads) {
    std::vector<uint8_t> digits(2 * rows * m);
    std::vector<float> unit(rows);
#pragma omp parallel num_threads(threads) if (wakes(threads, rows * n * m))
    {
#pragma omp for schedule(static)
        for (long j = 0; j < rows; j++) unit[j] = to_digits(x + j * m, m, digits.data() + 2 * j * m);
        auto keep = [&](long i, long wide, long j, long deep, int32_t sums[][GROUP]) {
            for (long b = 0; b < deep; b += 2)
                for (long a = 0; a < wide; a++) {
                    int32_t above = 64 * whole[i + a];
                    float sum = (sums[b][a] - above) + (sums[b + 1][a] - above) / 126.0f;
                    float scaled = sum * (unit[(j + b) / 2] * step[i + a]);
                    y[(j + b) / 2 * n + i + a] = scaled + (bias ? bias[i + a] : 0);
                }
        };
        product<Int8, int32_t>(w, n, digits.data(), 2 * rows, m / 4, keep);
    }
}

// Attention of one token per sequence over the first lengths[i] tokens of slot i, including itself: first stores its
// key k and value v at lengths[i] - 1. Strides in elements: q_row, kv_row between sequences of q and of k, v; `slot`,
// `head` between slots and heads of keys and values (slots, kv_heads, tokens, size). y is (texts, heads, size).
void attend_float32(const float *q, long q_row, const float *k, const float *v, long kv_row, float *keys,
                    float *values, long slot, long head, const int64_t *lengths, int texts, int kv_heads, int group,
                    int size, float *y, int threads) {
    attend<Single>(q, q_row, k, v, kv_row, keys, values, slot, head, lengths, texts, kv_heads, group, size, y,
                  threads);
}

void attend_bfloat16(const uint16_t *q, long q_row, const uint16_t *k, const uint16_t *v, long kv_row, uint16_t *keys,
                     uint16_t *values, long slot, long head, const int64_t *lengths, int texts, int kv_heads,
                     int group, int size, uint16_t *y, int threads) {
    attend<Half>(q, q_row, k, v, kv_row, keys, values, slot, head, lengths, texts, kv_heads, group, size, y,
                threads);
}
}
