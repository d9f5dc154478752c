/* Antialiased bilinear resampling for training: lines first (16-bit multiply-high), then columns (pairwise
 * multiply-add). Each step has a portable and an AVX2 version with the same integers; tests compare them.
 */

#define LINE_TOTAL 65535 /* sum of the weights of the lines */
#define PIXEL_BITS 14    /* weights along a line sum to 1 << 14 */
#define FRACTION 4       /* extra bits of a plane's samples until the colour conversion */

/* One axis: output i is the weighted sum of taps samples from first[i] on; samples may lie past the end of
 * the source, with weight 0. */
typedef struct {
    int out, taps, low, high; /* low, high: range of samples with a weight */
    int32_t *first;           /* (out,), padded with 0 to a multiple of 16 */
    int32_t *weights;         /* (out, taps) */
} Axis;

static int axis_taps(double span, int out) {
    double scale = span / out;
    return (int)ceil(2.0 * (scale < 1.0 ? 1.0 : scale));
}

/* Fill the weights of the triangle filter over [start, start + span) of a source; flip: in reverse order. */
static void axis_fill(Axis *a, double start, double span, int out, int flip, int total) {
    double scale = span / out, support = scale < 1.0 ? 1.0 : scale, inverse = 1.0 / support;
    a->out = out;
    a->taps = axis_taps(span, out);
    a->low = (int)floor(start + 1e-6);
    a->high = (int)ceil(start + span - 1e-6);
    for (int i = 0; i < out; i++) {
        int to = flip ? out - 1 - i : i, largest = 0, rest = total;
        double centre = start + (i + 0.5) * scale - 0.5, sum = 0.0;
        int first = (int)(centre - support + 65537.0) - 65536, /* floor() + 1, without a call */
            end = first + a->taps;
        if (first < a->low) first = a->low;
        if (end > a->high) end = a->high;
        int32_t *w = a->weights + (size_t)to * a->taps;
        double exact[a->taps];
        for (int t = 0; t < a->taps; t++) {
            double x = 1.0 - fabs(first + t - centre) * inverse;
            exact[t] = first + t < end && x > 0 ? x : 0.0;
            sum += exact[t];
        }
        double factor = total / sum;
        for (int t = 0; t < a->taps; t++) {
            w[t] = (int32_t)(exact[t] * factor + 0.5);
            rest -= w[t];
            if (w[t] > w[largest]) largest = t;
        }
        w[largest] += rest; /* so that the weights sum to the total */
        a->first[to] = first;
    }
}

/* ---- lines: out[x] = sum of lines[t][x] * w[t], for n bytes ---- */

static void lines_portable(const uint8_t *const *lines, const int32_t *w, int taps, int n, uint8_t *out) {
    for (int x = 0; x < n; x++) {
        uint32_t sum = 128 + taps / 2;
        for (int t = 0; t < taps; t++) sum += ((uint32_t)lines[t][x] << 8) * (uint32_t)w[t] >> 16;
        out[x] = (uint8_t)(sum >> 8);
    }
}

/* ---- planes: one line of samples to int16 with FRACTION bits ---- */

typedef struct {
    int groups, pairs; /* groups of 16 outputs; pairs of taps */
    int32_t *base;     /* (groups, 4): first sample of every 4 outputs */
    uint8_t *mask;     /* (groups, 64): position of each output's pair among 16 samples */
    int16_t *weights;  /* (groups, pairs, 32) */
} Plan;

#define SPREAD 14 /* largest distance of the pairs of 4 outputs in 16 bytes */

/* Returns 0 when the 4 outputs of a shuffle lie too far apart, at scales above 4. */
static int plan_fill(Plan *p, const Axis *a) {
    for (int quad = 0; quad < 4 * p->groups; quad++) {
        int g = quad / 4, lane = quad % 4 / 2, half = quad % 2; /* outputs 0-3 8-11 | 4-7 12-15, the order of packs */
        int x = 16 * g + 8 * lane + 4 * half, count = a->out - x < 4 ? a->out - x : 4, base = INT32_MAX;
        for (int i = 0; i < count; i++)
            if (a->first[x + i] < base) base = a->first[x + i];
        if (count <= 0) base = 0;
        p->base[4 * g + 2 * lane + half] = base;
        for (int i = 0; i < 4; i++) {
            int apart = i < count ? a->first[x + i] - base : 0, at = 32 * half + 16 * lane + 4 * i;
            if (apart > SPREAD) return 0;
            uint8_t pair[4] = {(uint8_t)apart, 0x80, (uint8_t)(apart + 1), 0x80};
            memcpy(p->mask + 64 * g + at, pair, 4);
            for (int t = 0; t < 2 * p->pairs; t++) {
                int16_t *w = p->weights + 32 * ((size_t)g * p->pairs + t / 2) + at / 2 + t % 2;
                *w = i < count && t < a->taps ? (int16_t)a->weights[(size_t)(x + i) * a->taps + t] : 0;
            }
        }
    }
    return 1;
}

/* Weights of pixels_avx2: (groups of 8 outputs, quads of taps, 4, 2, 16), outputs i and i + 4 side by side. */
static size_t pixel_weights_size(const Axis *a) {
    return (size_t)((a->out + 7) / 8) * ((a->taps + 3) / 4) * 4 * 32;
}

static void pixel_weights_fill(const Axis *a, int16_t *w) {
    for (int x = 0; x < a->out; x += 8)
        for (int q = 0; q < (a->taps + 3) / 4; q++)
            for (int i = 0; i < 4; i++)
                for (int pair = 0; pair < 2; pair++)
                    for (int lane = 0; lane < 2; lane++, w += 8)
                        for (int k = 0; k < 8; k++) {
                            int to = x + i + 4 * lane, t = 4 * q + 2 * pair + k % 2;
                            w[k] = to < a->out && t < a->taps ? (int16_t)a->weights[(size_t)to * a->taps + t] : 0;
                        }
}

static void plane_portable(const Axis *a, const uint8_t *line, int16_t *out) {
    for (int x = 0; x < a->out; x++) {
        int32_t sum = 1 << (PIXEL_BITS - FRACTION - 1);
        for (int t = 0; t < a->taps; t++) sum += line[a->first[x] + t] * a->weights[(size_t)x * a->taps + t];
        out[x] = (int16_t)(sum >> (PIXEL_BITS - FRACTION));
    }
}

static inline int rounded(int a, int b) { /* pmulhrsw */
    return (a * b + 0x4000) >> 15;
}

static inline uint8_t sample(int value) {
    value = (value + (1 << (FRACTION - 1))) >> FRACTION;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

enum { RED_CR = 13173, GREEN_CB = -11277, GREEN_CR = -23401, BLUE_CB = -7471 }; /* Q15 of .402 -.344 -.714 -.228 */

static void colour_portable(const int16_t *y, const int16_t *u, const int16_t *v, int from, int to, int ycc, uint8_t *out) {
    for (int x = from; x < to; x++, out += 3) {
        if (!ycc) {
            out[0] = sample(y[x]), out[1] = sample(u[x]), out[2] = sample(v[x]);
            continue;
        }
        int cb = u[x] - (128 << FRACTION), cr = v[x] - (128 << FRACTION);
        out[0] = sample(y[x] + cr + rounded(cr, RED_CR));
        out[1] = sample(y[x] + rounded(cb, GREEN_CB) + rounded(cr, GREEN_CR));
        out[2] = sample(y[x] + 2 * cb + rounded(cb, BLUE_CB));
    }
}

/* ---- pixels: one line of RGB to RGB ---- */

static void pixels_portable(const Axis *a, const uint8_t *line, int from, uint8_t *out) {
    for (int x = from; x < a->out; x++)
        for (int c = 0; c < 3; c++) {
            int32_t sum = 1 << (PIXEL_BITS - 1);
            for (int t = 0; t < a->taps; t++)
                sum += line[3 * (a->first[x] + t) + c] * a->weights[(size_t)x * a->taps + t];
            out[3 * x + c] = (uint8_t)(sum >> PIXEL_BITS);
        }
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))

/* 4 pixels at `low` and 4 at `high`; the masks widen taps (0, 1) and (2, 3) to pairs R R G G B B. */
#define PIXEL_PAIRS_0 _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1)
#define PIXEL_PAIRS_1 _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1)

AVX2 static inline __m256i two_pixels(const uint8_t *low, const uint8_t *high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                                   _mm_loadu_si128((const __m128i *)high), 1);
}

/* Write min(8, remaining) pixels; sum[i] holds outputs i and i + 4 as R G B 0, 32 bits each. */
AVX2 static inline void store_pixels(const __m256i *sum, uint8_t *out, int remaining) {
    const __m256i tight =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    __m256i all = _mm256_packus_epi16(_mm256_packs_epi32(sum[0], sum[1]), _mm256_packs_epi32(sum[2], sum[3]));
    all = _mm256_shuffle_epi8(all, tight);
    uint8_t buffer[32]; /* the stores write 28 bytes for 24, which at the end would overwrite the next image */
    uint8_t *to = remaining >= 10 ? out : buffer;
    _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(all));
    _mm_storeu_si128((__m128i *)(to + 12), _mm256_extracti128_si256(all, 1));
    if (to == buffer) memcpy(out, buffer, remaining < 8 ? 3 * (size_t)remaining : 24);
}

AVX2 static inline __attribute__((always_inline)) __m256i lines_block(
    const uint8_t *const *lines, const __m256i *w, int taps, int x, __m256i bias) {
    __m256i zero = _mm256_setzero_si256(), low = bias, high = bias;
    for (int t = 0; t < taps; t++) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(lines[t] + x));
        low = _mm256_add_epi16(low, _mm256_mulhi_epu16(_mm256_unpacklo_epi8(zero, v), w[t]));
        high = _mm256_add_epi16(high, _mm256_mulhi_epu16(_mm256_unpackhi_epi8(zero, v), w[t]));
    }
    return _mm256_packus_epi16(_mm256_srli_epi16(low, 8), _mm256_srli_epi16(high, 8));
}

AVX2 static inline __attribute__((always_inline)) void lines_all(
    const uint8_t *const *lines, const __m256i *w, int taps, int n, uint8_t *out) {
    __m256i bias = _mm256_set1_epi16((short)(128 + taps / 2));
    for (int x = 0; x + 32 <= n; x += 32)
        _mm256_storeu_si256((__m256i *)(out + x), lines_block(lines, w, taps, x, bias));
    if (n % 32) _mm256_storeu_si256((__m256i *)(out + n - 32), lines_block(lines, w, taps, n - 32, bias));
}

#define MOST_LINES 24

AVX2 static void lines_avx2(const uint8_t *const *lines, const int32_t *weights, int taps, int n, uint8_t *out) {
    __m256i w[MOST_LINES];
    for (int t = 0; t < taps; t++) w[t] = _mm256_set1_epi16((short)weights[t]);
    switch (taps) { /* the common counts, unrolled */
    case 2: lines_all(lines, w, 2, n, out); break;
    case 3: lines_all(lines, w, 3, n, out); break;
    case 4: lines_all(lines, w, 4, n, out); break;
    default: lines_all(lines, w, taps, n, out);
    }
}

AVX2 static void plane_avx2(const Plan *p, const uint8_t *line, int16_t *out) {
    __m256i half = _mm256_set1_epi32(1 << (PIXEL_BITS - FRACTION - 1));
    const int16_t *w = p->weights;
    for (int g = 0; g < p->groups; g++) {
        const int32_t *base = p->base + 4 * g;
        __m256i mask0 = _mm256_load_si256((const __m256i *)(p->mask + 64 * g));
        __m256i mask1 = _mm256_load_si256((const __m256i *)(p->mask + 64 * g + 32));
        __m256i sum0 = half, sum1 = half;
        for (int t = 0; t < p->pairs; t++, w += 32) {
            __m256i a = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(line + base[0] + 2 * t))),
                _mm_loadu_si128((const __m128i *)(line + base[2] + 2 * t)), 1);
            __m256i b = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(line + base[1] + 2 * t))),
                _mm_loadu_si128((const __m128i *)(line + base[3] + 2 * t)), 1);
            a = _mm256_madd_epi16(_mm256_shuffle_epi8(a, mask0), _mm256_load_si256((const __m256i *)w));
            b = _mm256_madd_epi16(_mm256_shuffle_epi8(b, mask1), _mm256_load_si256((const __m256i *)(w + 16)));
            sum0 = _mm256_add_epi32(sum0, a);
            sum1 = _mm256_add_epi32(sum1, b);
        }
        sum0 = _mm256_srai_epi32(sum0, PIXEL_BITS - FRACTION);
        sum1 = _mm256_srai_epi32(sum1, PIXEL_BITS - FRACTION);
        _mm256_store_si256((__m256i *)(out + 16 * g), _mm256_packs_epi32(sum0, sum1));
    }
}

/* 16 samples with FRACTION extra bits, rounded to bytes */
AVX2 static inline __m128i bytes_of(__m256i v) {
    v = _mm256_srai_epi16(_mm256_add_epi16(v, _mm256_set1_epi16(1 << (FRACTION - 1))), FRACTION);
    return _mm_packus_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

AVX2 static void colour_avx2(const int16_t *py, const int16_t *pu, const int16_t *pv, int width, int ycc, uint8_t *out) {
    const __m128i spread[3][3] = {
        {_mm_setr_epi8(0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1, 5),
         _mm_setr_epi8(-1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1),
         _mm_setr_epi8(-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1)},
        {_mm_setr_epi8(-1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10, -1),
         _mm_setr_epi8(5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10),
         _mm_setr_epi8(-1, 5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1)},
        {_mm_setr_epi8(-1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1, -1),
         _mm_setr_epi8(-1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1),
         _mm_setr_epi8(10, -1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15)},
    };
    __m256i middle = _mm256_set1_epi16(128 << FRACTION);
    for (int x = 0; x < width; x += 16) {
        __m256i y = _mm256_load_si256((const __m256i *)(py + x)), r = y;
        __m256i g = _mm256_load_si256((const __m256i *)(pu + x)), b = _mm256_load_si256((const __m256i *)(pv + x));
        if (ycc) {
            __m256i cb = _mm256_sub_epi16(g, middle), cr = _mm256_sub_epi16(b, middle);
            r = _mm256_add_epi16(_mm256_add_epi16(y, cr), _mm256_mulhrs_epi16(cr, _mm256_set1_epi16(RED_CR)));
            g = _mm256_add_epi16(_mm256_mulhrs_epi16(cb, _mm256_set1_epi16(GREEN_CB)),
                                 _mm256_mulhrs_epi16(cr, _mm256_set1_epi16(GREEN_CR)));
            g = _mm256_add_epi16(y, g);
            b = _mm256_add_epi16(_mm256_add_epi16(cb, cb), _mm256_mulhrs_epi16(cb, _mm256_set1_epi16(BLUE_CB)));
            b = _mm256_add_epi16(y, b);
        }
        __m128i red = bytes_of(r), green = bytes_of(g), blue = bytes_of(b), done[3];
        for (int i = 0; i < 3; i++)
            done[i] = _mm_or_si128(_mm_shuffle_epi8(red, spread[i][0]),
                                   _mm_or_si128(_mm_shuffle_epi8(green, spread[i][1]),
                                                _mm_shuffle_epi8(blue, spread[i][2])));
        if (x + 16 <= width) {
            for (int i = 0; i < 3; i++) _mm_storeu_si128((__m128i *)(out + 3 * x + 16 * i), done[i]);
        } else {
            memcpy(out + 3 * x, done, 3 * (size_t)(width - x));
        }
    }
}

/* `quads` of taps for each output; the caller passes the usual 1 as a constant. */
AVX2 static inline __attribute__((always_inline)) void pixels_all(const Axis *a, const int16_t *weights, int quads,
                                                                  const uint8_t *line, uint8_t *out) {
    const __m256i first = _mm256_broadcastsi128_si256(PIXEL_PAIRS_0), second = _mm256_broadcastsi128_si256(PIXEL_PAIRS_1);
    const __m256i half = _mm256_set1_epi32(1 << (PIXEL_BITS - 1)), *w = (const __m256i *)weights;
    for (int x = 0; x < a->out; x += 8) {
        const int32_t *at = a->first + x;
        __m256i sum[4] = {half, half, half, half};
        for (int t = 0; t < quads; t++)
            for (int i = 0; i < 4; i++, w += 2) {
                __m256i v = two_pixels(line + 3 * (int64_t)at[i] + 12 * t, line + 3 * (int64_t)at[i + 4] + 12 * t);
                __m256i one = _mm256_madd_epi16(_mm256_shuffle_epi8(v, first), _mm256_load_si256(w));
                __m256i two = _mm256_madd_epi16(_mm256_shuffle_epi8(v, second), _mm256_load_si256(w + 1));
                sum[i] = _mm256_add_epi32(sum[i], _mm256_add_epi32(one, two));
            }
        for (int i = 0; i < 4; i++) sum[i] = _mm256_srai_epi32(sum[i], PIXEL_BITS);
        store_pixels(sum, out + 3 * x, a->out - x);
    }
}

AVX2 static void pixels_avx2(const Axis *a, const int16_t *weights, const uint8_t *line, uint8_t *out) {
    if (a->taps <= 4) pixels_all(a, weights, 1, line, out);
    else pixels_all(a, weights, (a->taps + 3) / 4, line, out);
}
#endif
