/* Crop and resize 8-bit RGB with the filters of Pillow, bit for bit, in AVX2 (x86-64 processors since 2013).
 *
 * Pillow's resampling is integer arithmetic: weights in 22-bit fixed point, a horizontal pass rounded to 8 bits, then
 * a vertical one, or the other way round. Integer sums do not depend on their order, so vectors give the same pixels.
 * Pure arithmetic behind one C function, loaded through ctypes: no Python header, no library, no state.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PRECISION 22
#define HALF (1 << (PRECISION - 1))
#define AVX2 __attribute__((target("avx2")))

/* What one output position takes of its input line: `count` positions from `first` on. */
typedef struct {
    int32_t first, count;
} Window;

/* The fixed-point weights of all windows, `stride` to a window. */
typedef struct {
    Window *windows;
    int32_t *weights;
    int32_t stride;
} Plan;

static double bilinear(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

/* Keys' cubic convolution with a = -1/2. */
static double bicubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

static void free_plan(Plan *plan) {
    free(plan->windows);
    free(plan->weights);
}

/* Weights of `length` input positions on `out` output positions. Returns 0, or -1 without memory. */
static int make_plan(Plan *plan, int32_t length, int32_t out, int cubic) {
    double (*filter)(double) = cubic ? bicubic : bilinear;
    const double scale = (double)length / out, wide = scale < 1.0 ? 1.0 : scale;
    const double support = (cubic ? 2.0 : 1.0) * wide, narrow = 1.0 / wide;
    plan->stride = (int32_t)ceil(support) * 2 + 1;
    plan->windows = malloc(sizeof(Window) * (size_t)out);
    plan->weights = malloc(sizeof(int32_t) * (size_t)out * (size_t)plan->stride);
    double *exact = malloc(sizeof(double) * (size_t)plan->stride);
    if (!plan->windows || !plan->weights || !exact) {
        free(exact);
        free_plan(plan);
        return -1;
    }
    for (int32_t i = 0; i < out; i++) {
        const double centre = (i + 0.5) * scale;
        int32_t first = (int32_t)(centre - support + 0.5), end = (int32_t)(centre + support + 0.5);
        if (first < 0) first = 0;
        if (end > length) end = length;
        double sum = 0.0;
        for (int32_t t = 0; t < end - first; t++) {
            exact[t] = filter((t + first - centre + 0.5) * narrow);
            sum += exact[t];
        }
        int32_t *weights = plan->weights + (size_t)i * plan->stride;
        for (int32_t t = 0; t < end - first; t++) {
            const double weight = (sum != 0.0 ? exact[t] / sum : exact[t]) * (1 << PRECISION);
            weights[t] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        plan->windows[i] = (Window){first, end - first};
    }
    free(exact);
    return 0;
}

/* Eight sums in fixed point as bytes, 0 to 255, in the low half of the result. */
AVX2 static inline __m128i rounded(__m256i sums) {
    sums = _mm256_srai_epi32(sums, PRECISION);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return _mm_packus_epi16(words, words);
}

/* in: `rows` lines of `pitch` 4-byte pixels; out: `rows` lines of `width` packed 3-byte pixels and one byte to spare. */
AVX2 static void horizontal(const uint8_t *in, int64_t pitch, int32_t rows, const Plan *plan, int32_t width,
                            uint8_t *out) {
    const __m256i twice_four = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    for (int32_t y = 0; y < rows; y++, in += 4 * pitch) {
        for (int32_t x = 0; x < width; x++, out += 3) {
            const int32_t *weights = plan->weights + (size_t)x * plan->stride;
            const int32_t count = plan->windows[x].count;
            const uint8_t *pixel = in + 4 * (int64_t)plan->windows[x].first;
            __m256i pairs = _mm256_setzero_si256(); /* even positions in the low half, odd ones in the high half */
            int32_t t = 0;
            for (; t + 1 < count; t += 2, pixel += 8) {
                const __m256i two = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)pixel));
                const __m256i weight = _mm256_castsi128_si256(_mm_loadl_epi64((const __m128i *)(weights + t)));
                pairs = _mm256_add_epi32(
                    pairs, _mm256_mullo_epi32(two, _mm256_permutevar8x32_epi32(weight, twice_four)));
            }
            __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
            if (t < count) {
                int32_t one;
                memcpy(&one, pixel, 4);
                const __m128i last = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(one));
                sum = _mm_add_epi32(sum, _mm_mullo_epi32(last, _mm_set1_epi32(weights[t])));
            }
            sum = _mm_add_epi32(sum, _mm_set1_epi32(HALF));
            const int32_t bytes = _mm_cvtsi128_si32(rounded(_mm256_castsi128_si256(sum)));
            memcpy(out, &bytes, 4); /* the fourth byte is overwritten by the next pixel */
        }
    }
}

/* in: lines of `bytes` bytes, `stride` apart; out: `rows` lines of as many, without gaps. */
AVX2 static void vertical(const uint8_t *in, int64_t stride, int64_t bytes, int32_t rows, const Plan *plan,
                          uint8_t *out) {
    for (int32_t y = 0; y < rows; y++, out += bytes) {
        const int32_t *weights = plan->weights + (size_t)y * plan->stride;
        const int32_t count = plan->windows[y].count;
        const uint8_t *column = in + stride * plan->windows[y].first;
        int64_t i = 0;
        for (; i + 8 <= bytes; i += 8) {
            __m256i sums = _mm256_set1_epi32(HALF);
            for (int32_t t = 0; t < count; t++) {
                const __m256i line = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(column + i + t * stride)));
                sums = _mm256_add_epi32(sums, _mm256_mullo_epi32(line, _mm256_set1_epi32(weights[t])));
            }
            _mm_storel_epi64((__m128i *)(out + i), rounded(sums));
        }
        for (; i < bytes; i++) {
            int32_t sum = HALF;
            for (int32_t t = 0; t < count; t++) sum += column[i + t * stride] * weights[t];
            sum >>= PRECISION;
            out[i] = (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
        }
    }
}

/* Resize a region of an image of 4-byte pixels, `pitch` to a line, to packed RGB.
 *
 * in: first pixel of the region, height x width of it; out: out_height x out_width x 3 bytes and one to spare;
 * cubic: 0 for bilinear. Returns 0, or -1 without memory or AVX2.
 */
int swin_scale_resample(const uint8_t *in, int64_t pitch, int32_t height, int32_t width, uint8_t *out,
                        int32_t out_height, int32_t out_width, int cubic) {
    Plan across, down;
    if (!__builtin_cpu_supports("avx2")) return -1;
    if (make_plan(&across, width, out_width, cubic)) return -1;
    if (make_plan(&down, height, out_height, cubic)) {
        free_plan(&across);
        return -1;
    }
    /* Where the height shrinks much more than the width Pillow begins with it; the rounding in between differs. */
    const int32_t narrower = width > out_width ? width - out_width : 0;
    const int down_first = height > out_height && height - out_height > 2 * (int64_t)narrower;
    uint8_t *between = malloc(down_first ? (size_t)out_height * width * 4 : (size_t)height * out_width * 3 + 1);
    const int failed = between ? 0 : -1;
    if (between && down_first) {
        vertical(in, 4 * pitch, 4 * (int64_t)width, out_height, &down, between);
        horizontal(between, width, out_height, &across, out_width, out);
    } else if (between) {
        horizontal(in, pitch, height, &across, out_width, between);
        vertical(between, 3 * (int64_t)out_width, 3 * (int64_t)out_width, out_height, &down, out);
    }
    free(between);
    free_plan(&across);
    free_plan(&down);
    return failed;
}
