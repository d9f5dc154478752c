/* Pillow's resampling of 8-bit images (ImagingResample): the same arithmetic, rounding and order of passes. */

#define PRECISION 22

typedef struct {
    int size, needed, *bounds; /* bounds: first source sample and count of each output sample */
    int32_t *weights;          /* `size` for each output sample */
    int16_t *halves;           /* for across_avx2: the weights in two halves; NULL: use across_portable */
} Kernel;

static double bicubic(double x) {
    x = fabs(x);
    if (x < 1.0) return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * -0.5;
    return 0.0;
}

static double triangle(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double kernel_support(float in0, float in1, int out, int cubic) {
    double scale = (double)(in1 - in0) / out;
    return (cubic ? 2.0 : 1.0) * (scale < 1.0 ? 1.0 : scale);
}

static int kernel_size(float in0, float in1, int out, int cubic) {
    return (int)ceil(kernel_support(in0, in1, out, cubic)) * 2 + 1;
}

/* Fill k->bounds (2 x out) and k->weights (out x size); `exact` is a buffer of `size` doubles. */
static void kernel_fill(Kernel *k, int in, float in0, float in1, int out, int cubic, double *exact) {
    double scale = (double)(in1 - in0) / out, support = kernel_support(in0, in1, out, cubic);
    double ss = 1.0 / (scale < 1.0 ? 1.0 : scale);
    k->size = kernel_size(in0, in1, out, cubic);
    k->needed = out != in || in0 != 0 || in1 != out;
    for (int x = 0; x < out; x++) {
        double center = in0 + (x + 0.5) * scale, total = 0.0;
        int first = (int)(center - support + 0.5), end = (int)(center + support + 0.5);
        if (first < 0) first = 0;
        if (end > in) end = in;
        for (int i = 0; i < end - first; i++) {
            double distance = (i + first - center + 0.5) * ss;
            exact[i] = cubic ? bicubic(distance) : triangle(distance);
            total += exact[i];
        }
        for (int i = 0; i < end - first; i++) {
            double w = (total != 0.0 ? exact[i] / total : exact[i]) * (1 << PRECISION);
            k->weights[x * k->size + i] = (int)(w < 0 ? -0.5 + w : 0.5 + w);
        }
        k->bounds[2 * x] = first;
        k->bounds[2 * x + 1] = end - first;
    }
}

static inline uint8_t clip8(int32_t value) {
    value >>= PRECISION;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* Resample one line of RGB pixels to `width` pixels. */
static void across_portable(const uint8_t *in, uint8_t *restrict out, int width, const Kernel *k) {
    for (int x = 0; x < width; x++) {
        const uint8_t *from = in + 3 * k->bounds[2 * x];
        const int32_t *w = k->weights + x * k->size;
        int32_t r = 1 << (PRECISION - 1), g = r, b = r;
        for (int i = 0; i < k->bounds[2 * x + 1]; i++) {
            r += from[3 * i] * w[i];
            g += from[3 * i + 1] * w[i];
            b += from[3 * i + 2] * w[i];
        }
        out[3 * x] = clip8(r);
        out[3 * x + 1] = clip8(g);
        out[3 * x + 2] = clip8(b);
    }
}

/* Weighted sum of `count` lines. */
static void down_portable(const uint8_t *const *lines, int count, const int32_t *w, int length,
                          uint8_t *restrict out) {
    for (int x = 0; x < length; x += 64) {
        int32_t sum[64];
        int block = length - x < 64 ? length - x : 64;
        for (int i = 0; i < block; i++) sum[i] = 1 << (PRECISION - 1);
        for (int r = 0; r < count; r++) {
            for (int i = 0; i < block; i++) sum[i] += lines[r][x + i] * w[r];
        }
        for (int i = 0; i < block; i++) out[x + i] = clip8(sum[i]);
    }
}

#ifdef AVX2
/* A 24-bit weight is split into high << HALF plus low, so that 16-bit multiply-adds give the same 32-bit sums. */
#define HALF 11
#define HALF_MASK ((1 << HALF) - 1)
#define MOST_COUNT 64

/* Layout: (groups of 8 outputs, quads of taps, 4, 2 pairs, high and low, 16), outputs i and i + 4 side by side. */
static size_t halves_size(const Kernel *k, int out) {
    return (size_t)((out + 7) / 8) * ((k->size + 3) / 4) * 4 * 64;
}

static void halves_fill(const Kernel *k, int out, int16_t *to) {
    for (int x = 0; x < out; x += 8)
        for (int t0 = 0; t0 < k->size; t0 += 4)
            for (int i = 0; i < 4; i++)
                for (int pair = 0; pair < 2; pair++, to += 32)
                    for (int n = 0; n < 16; n++) {
                        int o = x + i + 4 * (n / 8), t = t0 + 2 * pair + n % 2;
                        int32_t w = o < out && t < k->bounds[2 * o + 1] ? k->weights[(size_t)o * k->size + t] : 0;
                        to[n] = (int16_t)(w >> HALF);
                        to[n + 16] = (int16_t)(w & HALF_MASK);
                    }
}

AVX2 static void across_avx2(const uint8_t *in, uint8_t *out, int width, const Kernel *k) {
    const __m256i first = _mm256_broadcastsi128_si256(PIXEL_PAIRS_0), second = _mm256_broadcastsi128_si256(PIXEL_PAIRS_1);
    const __m256i half = _mm256_set1_epi32(1 << (PRECISION - 1)), zero = _mm256_setzero_si256();
    const __m256i *w = (const __m256i *)k->halves;
    for (int x = 0; x < width; x += 8) {
        __m256i high[4] = {zero, zero, zero, zero}, low[4] = {half, half, half, half};
        for (int t = 0; t < k->size; t += 4)
            for (int i = 0; i < 4; i++, w += 4) {
                __m256i v = two_pixels(in + 3 * (k->bounds[2 * (x + i)] + t), in + 3 * (k->bounds[2 * (x + i + 4)] + t));
                __m256i a = _mm256_shuffle_epi8(v, first), b = _mm256_shuffle_epi8(v, second);
                high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(a, w[0]));
                low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(a, w[1]));
                high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(b, w[2]));
                low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(b, w[3]));
            }
        for (int i = 0; i < 4; i++)
            low[i] = _mm256_srai_epi32(_mm256_add_epi32(low[i], _mm256_slli_epi32(high[i], HALF)), PRECISION);
        store_pixels(low, out + 3 * x, width - x);
    }
}

AVX2 static inline __attribute__((always_inline)) __m256i down_block(const uint8_t *const *lines, const __m256i (*w)[2],
                                                                     int count, int x) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i high[4] = {zero, zero, zero, zero}, low[4];
    for (int i = 0; i < 4; i++) low[i] = _mm256_set1_epi32(1 << (PRECISION - 1));
    for (int r = 0; r < count; r += 2) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(lines[r] + x));
        __m256i b = _mm256_loadu_si256((const __m256i *)(lines[r + 1 < count ? r + 1 : r] + x));
        __m256i front = _mm256_unpacklo_epi8(a, b), back = _mm256_unpackhi_epi8(a, b);
        __m256i pairs[4] = {_mm256_unpacklo_epi8(front, zero), _mm256_unpackhi_epi8(front, zero),
                            _mm256_unpacklo_epi8(back, zero), _mm256_unpackhi_epi8(back, zero)};
        for (int i = 0; i < 4; i++) {
            high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(pairs[i], w[r / 2][0]));
            low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(pairs[i], w[r / 2][1]));
        }
    }
    for (int i = 0; i < 4; i++)
        low[i] = _mm256_srai_epi32(_mm256_add_epi32(low[i], _mm256_slli_epi32(high[i], HALF)), PRECISION);
    return _mm256_packus_epi16(_mm256_packs_epi32(low[0], low[1]), _mm256_packs_epi32(low[2], low[3]));
}

AVX2 static void down_avx2(const uint8_t *const *lines, int count, const int32_t *weights, int length, uint8_t *out) {
    __m256i w[MOST_COUNT / 2][2];
    for (int r = 0; r < count; r += 2) {
        int32_t a = weights[r], b = r + 1 < count ? weights[r + 1] : 0;
        w[r / 2][0] = _mm256_set1_epi32((int32_t)((uint32_t)(b >> HALF) << 16 | ((a >> HALF) & 0xFFFF)));
        w[r / 2][1] = _mm256_set1_epi32((b & HALF_MASK) << 16 | (a & HALF_MASK));
    }
    for (int x = 0; x + 32 <= length; x += 32)
        _mm256_storeu_si256((__m256i *)(out + x), down_block(lines, w, count, x));
    if (length % 32) _mm256_storeu_si256((__m256i *)(out + length - 32), down_block(lines, w, count, length - 32));
}
#endif
