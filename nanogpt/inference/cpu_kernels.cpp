// Matrices times few rows, and attention of one query a head, on a CPU: what one more token of a text costs.
//
// That is reading matrices, keys and values. So a matrix is read once, from front to back, by all threads, and a
// few rows cost what one does. cpu_kernels.py compiles this file for the processor it is to run on, and calls it.
//
// A matrix (n, m) lies in groups of 32 rows: of each row 4 bytes (1 float32, 2 bfloat16, 4 int8), then the next 4
// of each, and so on. 4 bytes of a row of activations are multiplied with those of all 32 at once. So every sum has
// a lane of its own and one order, and a text gives the same bits in any company.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

using floats = float __attribute__((vector_size(64)));
using ints = int32_t __attribute__((vector_size(64)));
using words = uint32_t __attribute__((vector_size(64)));

template <class V> static inline V load(const void *from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

struct Float32 {
    using Sums = floats;
    static Sums add(Sums sums, words w, words x) { return sums + (floats)w * (floats)x; }
};

// Two bfloat16 lie in 32 bits, each the upper half of a float32: the one with the even number, and the odd one.
static inline floats even(words pairs) { return (floats)(pairs << 16); }
static inline floats odd(words pairs) { return (floats)(pairs & 0xffff0000u); }

struct BFloat16 {  // two to a lane
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

struct Int8 {  // four to a lane: whole weights of -127 to 127, and digits that are 128 too large
    using Sums = ints;
    static Sums add(Sums sums, words w, words x) {
#ifdef __AVX512VNNI__
        return (Sums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, (__m512i)w);
#else
        for (int shift = 24; shift >= 0; shift -= 8)
            sums += ((ints)(w << shift) >> 24) * (ints)((x << shift) >> 24);
        return sums;
#endif
    }
};

// Whether it is worth it to wake the other threads, some microseconds, for so many numbers.
static bool wakes(int threads, long numbers) { return threads > 1 && numbers >= 1 << 16; }

constexpr long GROUP = 32, DEEPEST = 8;  // rows of weights, and of activations, that are summed at once

// Sums of a group of weights times DEEP rows of activations, each of `steps` times 4 bytes.
template <class Format, int DEEP, class T>
static inline void tile(const char *w, const char *x, long steps, T sums[DEEPEST][GROUP]) {
    typename Format::Sums lanes[DEEP][2] = {};
    for (long k = 0; k < steps; k++) {
        words first = load<words>(w + 128 * k), second = load<words>(w + 128 * k + 64);
        for (int j = 0; j < DEEP; j++) {
            words here = words{} + load<uint32_t>(x + 4 * (j * steps + k));
            lanes[j][0] = Format::add(lanes[j][0], first, here);
            lanes[j][1] = Format::add(lanes[j][1], second, here);
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

// All sums of n rows of weights times `rows` of activations; keep(i, wide, j, deep, sums) is told those from row i
// of the weights and j of the activations on. To be called by all threads of a team.
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

static inline uint16_t to_bfloat16(float value) {  // to the nearest, ties to even
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

// The two digits of m activations, each 128 too large, and what the first digit counts.
static float to_digits(const float *x, long m, uint8_t *digits) {
    float largest = 1e-30f;
    for (long k = 0; k < m; k++) largest = std::fabs(x[k]) > largest ? std::fabs(x[k]) : largest;
    float unit = largest / 127;
    for (long k = 0; k < m; k++) {
        float value = x[k] / unit, high = std::nearbyint(value);
        digits[k] = (int)high + 128;
        digits[m + k] = (int)std::nearbyint((value - high) * 254) + 128;
    }
    return unit;
}

// How 64 bytes of keys or values become rows of 16 floats.
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

static inline float total(floats v) {
    using eight = float __attribute__((vector_size(32)));
    using four = float __attribute__((vector_size(16)));
    eight sum = load<eight>(&v) + load<eight>((char *)&v + 32);
    four rest = load<four>(&sum) + load<four>((char *)&sum + 16);
    return (rest[0] + rest[2]) + (rest[1] + rest[3]);
}

// y (size) of a query (size) over `length` keys and values (length, size).
template <class Kind, class T = typename Kind::Number>
static void attend_one(const T *query, const T *keys, const T *values, long length, int size, float *weights, T *y) {
    enum { MOST = 16 };  // rows of 16 floats: heads of up to 256 channels
    constexpr int ROWS = Kind::ROWS, WIDTH = 16 * ROWS;
    floats q[MOST], sums[MOST] = {}, here[ROWS];
    for (int i = 0; i < size; i++) q[i / WIDTH * ROWS + i % ROWS][i % WIDTH / ROWS] = Kind::number(query[i]);
    float scale = 1 / std::sqrt((float)size), largest = -INFINITY, sum = 0;
    for (long t = 0; t < length; t++) {
        floats lanes = {};
        for (int i = 0; i < size / WIDTH; i++) {
            Kind::split(load<words>(keys + t * size + i * WIDTH), here);
            for (int r = 0; r < ROWS; r++) lanes += q[i * ROWS + r] * here[r];
        }
        weights[t] = total(lanes) * scale;
        largest = weights[t] > largest ? weights[t] : largest;
    }
    for (long t = 0; t < length; t++) sum += weights[t] = std::exp(weights[t] - largest);
    for (long t = 0; t < length; t++)
        for (int i = 0; i < size / WIDTH; i++) {
            Kind::split(load<words>(values + t * size + i * WIDTH), here);
            for (int r = 0; r < ROWS; r++) sums[i * ROWS + r] += weights[t] * here[r];
        }
    for (int i = 0; i < size; i++) y[i] = Kind::rounded(sums[i / WIDTH * ROWS + i % ROWS][i % WIDTH / ROWS] / sum);
}

// As attend_float32 below.
template <class Kind, class T = typename Kind::Number>
static void attend(const T *q, long q_row, const T *k, const T *v, long kv_row, T *keys, T *values, long slot,
                   long head, const int64_t *lengths, int texts, int kv_heads, int group, int size, T *y,
                   int threads) {
    long numbers = 0;
    for (int text = 0; text < texts; text++) numbers += lengths[text] * kv_heads * size;
#pragma omp parallel for num_threads(threads) if (wakes(threads, 2 * numbers)) schedule(dynamic)
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

// y (rows, n) = x (rows, m) times w (n, m) transposed, plus bias (n) unless that is null.
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

// As above, with w in whole numbers, row i being step[i] times them; whole[i] is the sum of row i. An activation
// is rounded to a 127th of the largest of its row times (high + low / 254), both whole numbers of 8 bits.
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
                    int32_t above = 128 * whole[i + a];
                    float sum = (sums[b][a] - above) + (sums[b + 1][a] - above) / 254.0f;
                    float scaled = sum * (unit[(j + b) / 2] * step[i + a]);
                    y[(j + b) / 2 * n + i + a] = scaled + (bias ? bias[i + a] : 0);
                }
        };
        product<Int8, int32_t>(w, n, digits.data(), 2 * rows, m / 4, keep);
    }
}

// Attention of one token of each text, whose queries, keys and values lie q_row and kv_row numbers apart, over the
// first lengths[i] tokens of its slot, this one being the last: its key and value are written there. Slots of keys
// and values (kv_heads, tokens, size) lie `slot`, their heads `head` numbers apart; y is (texts, heads, size).
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
