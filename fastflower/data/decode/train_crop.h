/* Training crops. From JPEGs: only the crop's lines and columns, as planes, at a DCT scale that covers the target. */

#if JPEG_LIB_VERSION >= 70
#define DCT_WIDTH(c) (c)->DCT_h_scaled_size
#define DCT_HEIGHT(c) (c)->DCT_v_scaled_size
#define MIN_WIDTH(j) (j)->min_DCT_h_scaled_size
#define MIN_HEIGHT(j) (j)->min_DCT_v_scaled_size
#else
#define DCT_WIDTH(c) (c)->DCT_scaled_size
#define DCT_HEIGHT(c) (c)->DCT_scaled_size
#define MIN_WIDTH(j) (j)->min_DCT_scaled_size
#define MIN_HEIGHT(j) (j)->min_DCT_scaled_size
#endif

/* libjpeg's post-processing object, whose method is replaced: it upsamples and converts colours at the decoded
 * size, but the planes are needed. Its first two members are the same in every version. */
struct jpeg_d_post_controller {
    void (*start_pass)(j_decompress_ptr, int);
    void (*post_process_data)(j_decompress_ptr, JSAMPIMAGE, JDIMENSION *, JDIMENSION, JSAMPARRAY, JDIMENSION *, JDIMENSION);
};

typedef struct {
    Axis x, y;
    Plan plan;     /* of x; groups 0: use plane_portable */
    uint8_t *ring; /* decoded lines that later output lines may need */
    int stride, lines, left, width, decoded_lines;
    uint8_t *line;
    int16_t *resized; /* one line */
} Plane;

static void weigh_lines(const uint8_t *const *lines, const int32_t *w, int taps, int n, uint8_t *out) {
#ifdef AVX2
    if (fast && n >= 32 && taps <= MOST_LINES) return lines_avx2(lines, w, taps, n, out);
#endif
    lines_portable(lines, w, taps, n, out);
}

static void axis(Scratch *s, Axis *a, double start, double span, int out, int flip, int total) {
    size_t padded = ((size_t)out + 15) / 16 * 16;
    a->first = take(s, sizeof(int32_t) * padded);
    memset(a->first + out, 0, sizeof(int32_t) * (padded - out));
    a->weights = take(s, sizeof(int32_t) * out * axis_taps(span, out));
    axis_fill(a, start, span, out, flip, total);
}

static void plane_open(Scratch *s, Plane *p, const Box *b, double sx, double sy, int h, int w) {
    double left = b->left * sx, top = b->top * sy;
    p->left = (int)left;
    p->width = (int)ceil((b->left + b->width) * sx) - p->left;
    axis(s, &p->x, left - p->left, b->width * sx, w, b->flip, 1 << PIXEL_BITS);
    axis(s, &p->y, top, b->height * sy, h, 0, LINE_TOTAL);
    p->plan.groups = 0;
    if (fast) {
        Plan plan = {(w + 15) / 16, (p->x.taps + 1) / 2, NULL, NULL, NULL};
        plan.base = take(s, sizeof(int32_t) * 4 * plan.groups);
        plan.mask = take(s, 64 * (size_t)plan.groups);
        plan.weights = take(s, sizeof(int16_t) * 32 * plan.groups * plan.pairs);
        if (plan_fill(&plan, &p->x)) p->plan = plan;
    }
}

static void plane_rings(Scratch *s, Plane *p, int group, int w) {
    p->stride = (p->width + 63) / 64 * 64;
    for (p->lines = 1; p->lines < p->y.taps + group;) p->lines *= 2;
    p->ring = take(s, (size_t)p->stride * p->lines);
    p->line = take(s, p->stride + 2 * (size_t)p->x.taps);
    p->resized = take(s, sizeof(int16_t) * ((size_t)w + 15) / 16 * 16);
}

/* Replaces libjpeg's post-processing: copies the crop's columns of each plane to its ring. */
static void keep_planes(j_decompress_ptr j, JSAMPIMAGE in, JDIMENSION *group, JDIMENSION groups, JSAMPARRAY out,
                        JDIMENSION *lines, JDIMENSION room) {
    Plane *planes = j->client_data;
    (void)out, (void)room;
    for (int c = 0; c < j->num_components; c++) {
        Plane *p = &planes[c];
        jpeg_component_info *info = &j->comp_info[c];
        int each = info->v_samp_factor * DCT_HEIGHT(info) / MIN_HEIGHT(j);
        for (JDIMENSION i = *group * each; i < groups * each; i++, p->decoded_lines++)
            memcpy(p->ring + (size_t)(p->decoded_lines & (p->lines - 1)) * p->stride, in[c][i] + p->left, p->width);
    }
    JDIMENSION remaining = j->output_height - j->output_scanline, decoded = (groups - *group) * j->max_v_samp_factor;
    *group = groups;
    *lines += decoded < remaining ? decoded : remaining;
}

/* Compute output line y of a plane, whose lines have been decoded. */
static void plane_line(Plane *p, int y) {
    const Axis *a = &p->y;
    const uint8_t *lines[a->taps];
    for (int t = 0; t < a->taps; t++) {
        int line = a->first[y] + t < a->high ? a->first[y] + t : a->high - 1;
        lines[t] = p->ring + (size_t)(line & (p->lines - 1)) * p->stride;
    }
    weigh_lines(lines, a->weights + (size_t)y * a->taps, a->taps, p->width, p->line);
#ifdef AVX2
    if (p->plan.groups) return plane_avx2(&p->plan, p->line, p->resized);
#endif
    plane_portable(&p->x, p->line, p->resized);
}

static void train_jpeg(Scratch *s, const uint8_t *bytes, const Row *row, const Box *b, int h, int w, uint8_t *out) {
    struct jpeg_decompress_struct *j = &s->jpeg;
    Plane planes[3];
    check_header(s, bytes, row);
    for (j->scale_num = 8; j->scale_num > 1; j->scale_num /= 2)
        if (b->height * (int)j->scale_num / 2 < 8 * h || b->width * (int)j->scale_num / 2 < 8 * w) break;
    j->scale_denom = 8;
    if (j->num_components == 3 && j->jpeg_color_space != JCS_RGB) j->out_color_space = JCS_YCbCr;
    else j->out_color_space = j->jpeg_color_space;
    int ycc = j->out_color_space == JCS_YCbCr, count = j->num_components;
    j->do_fancy_upsampling = FALSE;
    j->dct_method = JDCT_ISLOW;
    j->client_data = planes;
    start_decompress(s);
    int unit = j->max_v_samp_factor * MIN_HEIGHT(j), scale = (int)j->scale_num;
    JDIMENSION x = b->left * scale / 8, end = (JDIMENSION)((b->left + b->width) * scale + 7) / 8;
    if (end > j->output_width) end = j->output_width;
    JDIMENSION width = end - x, whole = j->output_width;
    int skip = b->top * scale / 8 / unit;
    jpeg_crop_scanline(j, &x, &width);
    if (width == whole) x = 0;
    if (skip) jpeg_skip_scanlines(j, skip * unit);
    j->post->post_process_data = keep_planes;
    for (int c = 0; c < count; c++) {
        jpeg_component_info *info = &j->comp_info[c];
        double sx = (double)info->h_samp_factor * DCT_WIDTH(info) / (8 * j->max_h_samp_factor);
        double sy = (double)info->v_samp_factor * DCT_HEIGHT(info) / (8 * j->max_v_samp_factor);
        plane_open(s, &planes[c], b, sx, sy, h, w);
        plane_rings(s, &planes[c], info->v_samp_factor * DCT_HEIGHT(info), w);
        planes[c].left -= x * info->h_samp_factor * DCT_WIDTH(info) / (j->max_h_samp_factor * MIN_WIDTH(j));
        planes[c].decoded_lines = skip * info->v_samp_factor * DCT_HEIGHT(info);
    }
    JSAMPROW no_output[1] = {NULL};
    for (int y = 0; y < h; y++, out += 3 * (size_t)w) {
        for (int c = 0; c < count; c++) {
            Plane *p = &planes[c];
            int need = p->y.first[y] + p->y.taps < p->y.high ? p->y.first[y] + p->y.taps : p->y.high;
            while (p->decoded_lines < need) jpeg_read_scanlines(j, no_output, j->output_height);
        }
        for (int c = 0; c < count; c++) plane_line(&planes[c], y);
        const int16_t *first = planes[0].resized, *second = first, *third = first;
        if (count == 3) second = planes[1].resized, third = planes[2].resized;
#ifdef AVX2
        if (fast) {
            colour_avx2(first, second, third, w, ycc, out);
            continue;
        }
#endif
        colour_portable(first, second, third, 0, w, ycc, out);
    }
}

enum { LINES_AHEAD = 10 };

/* The lines of a raw crop lie far apart, so the processor's prefetcher cannot predict the next one. */
static inline void prefetch(const uint8_t *line, int length) {
    for (int x = 0; x < length; x += 64) __builtin_prefetch(line + x);
}

static void train_raw(Scratch *s, const uint8_t *bytes, const Row *row, const Box *b, int h, int w, uint8_t *out) {
    Axis x, y;
    axis(s, &x, 0, b->width, w, b->flip, 1 << PIXEL_BITS);
    axis(s, &y, 0, b->height, h, 0, LINE_TOTAL);
    const size_t stride = 3 * (size_t)row->width;
    const uint8_t *first = bytes + stride * b->top + 3 * (size_t)b->left;
    uint8_t *line = take(s, 3 * ((size_t)b->width + x.taps + 4));
    int16_t *weights = NULL;
    if (fast) pixel_weights_fill(&x, weights = take(s, sizeof(int16_t) * pixel_weights_size(&x)));
    for (int i = 0; i < h; i++, out += 3 * (size_t)w) {
        const uint8_t *lines[y.taps];
        for (int t = 0; t < y.taps; t++) {
            int from = y.first[i] + t < y.high ? y.first[i] + t : y.high - 1;
            lines[t] = first + stride * from;
        }
        if (y.first[i] + LINES_AHEAD < y.high) prefetch(first + stride * (y.first[i] + LINES_AHEAD), 3 * b->width);
        weigh_lines(lines, y.weights + (size_t)i * y.taps, y.taps, 3 * b->width, line);
#ifdef AVX2
        if (fast) {
            pixels_avx2(&x, weights, line, out);
            continue;
        }
#endif
        pixels_portable(&x, line, 0, out);
    }
}
