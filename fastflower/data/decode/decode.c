/* Decodes, crops, flips and resizes rows of a beton into a uint8 batch, in one call without Python.
 *
 * Training rows get a random crop that is a pure function of the row's key (the streams below; SplitMix64 as in
 * core/seeding.py). Evaluation rows are bit-identical to Pillow's accurate decode and 8-bit fixed-point resampling.
 * Every return code is checked; a libjpeg warning counts as damage, but for two about headers. Two of libjpeg's methods are replaced, because
 * they take a third of its time: Huffman decoding (entropy.h) and the steps after the inverse DCT (keep_planes).
 */

#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

#include "entropy.h"

#define API __attribute__((visibility("default")))

enum { JPEG = 0, RAW = 1 };
enum { OK = 0, DAMAGED = 1, SHAPE = 2, COLOUR = 3, MEMORY = 4, AGAIN = 5 };
enum { STREAM_FLIP = 1000, STREAM_AREA = 1010, STREAM_RATIO = 1030, STREAM_TOP = 1050, STREAM_LEFT = 1070 };

typedef struct { /* beton_file.DESCRIPTOR */
    uint64_t offset, size;
    int32_t height, width, mode, pad;
} Row;

typedef struct {
    double scale[2], ratio[2], flip;
    double whole; /* not 0: ratios are the crop's aspect over the image's, not over the target's */
} Crop;

typedef struct {
    int64_t position; /* first bad row in the batch; -1: none */
    int32_t code;
    char text[JMSG_LENGTH_MAX];
} Fault;

typedef struct {
    struct jpeg_error_mgr manager; /* first member: libjpeg's pointer to it is cast back */
    jmp_buf escape;
    char text[JMSG_LENGTH_MAX];
} Errors;

typedef struct {
    void *data;
    size_t size;
} Buffer;

enum { BUFFERS = 48 };

typedef struct {
    struct jpeg_decompress_struct jpeg; /* first member: libjpeg's pointer to it is cast back */
    Errors errors;
    Entropy entropy;
    int use_entropy; /* decode Huffman codes with entropy.h */
    Buffer buffers[BUFFERS];
    int used; /* buffers in use by the current row */
} Scratch;

/* ---- scratch: libjpeg handles and line buffers, kept between calls; slots are taken and returned atomically ---- */

#define SLOTS 256
static _Atomic(Scratch *) slots[SLOTS];

static void on_error(j_common_ptr jpeg) {
    Errors *errors = (Errors *)jpeg->err;
    errors->manager.format_message(jpeg, errors->text);
    longjmp(errors->escape, 1);
}

static void on_message(j_common_ptr jpeg, int level) {
    int code = jpeg->err->msg_code; /* versions and scan parameters that libjpeg does not use cost no pixel */
    if (level < 0 && code != JWRN_JFIF_MAJOR && code != JWRN_NOT_SEQUENTIAL)
        on_error(jpeg); /* after any other warning the pixels are guesses */
}

static Scratch *scratch_take(void) {
    for (int i = 0; i < SLOTS; i++) {
        Scratch *scratch = atomic_exchange(&slots[i], NULL);
        if (scratch) return scratch;
    }
    Scratch *volatile scratch = calloc(1, sizeof *scratch); /* volatile: freed after a longjmp */
    if (!scratch) return NULL;
    scratch->jpeg.err = jpeg_std_error(&scratch->errors.manager);
    scratch->errors.manager.error_exit = on_error;
    scratch->errors.manager.emit_message = on_message;
    if (setjmp(scratch->errors.escape)) {
        free(scratch);
        return NULL;
    }
    jpeg_create_decompress(&scratch->jpeg);
    return scratch;
}

static void scratch_put(Scratch *scratch) {
    for (int i = 0; i < SLOTS; i++) {
        Scratch *empty = NULL;
        if (atomic_compare_exchange_strong(&slots[i], &empty, scratch)) return;
    }
    jpeg_destroy_decompress(&scratch->jpeg);
    for (int i = 0; i < BUFFERS; i++) free(scratch->buffers[i].data);
    free(scratch);
}

/* The next buffer of the current row, 64-byte aligned; 64 bytes past its end may be read and written. */
static void *take(Scratch *s, size_t size) {
    Buffer *b = &s->buffers[s->used++];
    if (b->size < size) {
        free(b->data);
        b->data = aligned_alloc(64, (size + 127) / 64 * 64);
        b->size = b->data ? size : 0;
        if (!b->data) {
            snprintf(s->errors.text, sizeof s->errors.text, "out of memory");
            longjmp(s->errors.escape, MEMORY);
        }
    }
    return b->data;
}

/* A buffer that is not aligned: into aligned lines libjpeg-turbo writes around the cache, which slows the reader. */
static uint8_t *take_line(Scratch *s, size_t size) {
    return (uint8_t *)take(s, size + 8) + 8;
}

/* ---- random numbers: those of core/seeding.py, bit for bit ---- */

static uint64_t hash64(uint64_t x) {
    uint64_t z = x + 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static double uniform(uint64_t key, uint64_t stream) {
    return (double)(hash64(key ^ hash64(stream)) >> 11) * 0x1p-53;
}

typedef struct {
    int top, left, height, width, flip;
} Box;

/* torchvision's RandomResizedCrop.get_params; ratios are the crop's aspect over the target's, or the image's. */
API void ff_crop_box(uint64_t key, int height, int width, int out_h, int out_w, const Crop *crop, Box *box) {
    double aspect = crop->whole ? (double)width / height : (double)out_w / out_h, low = crop->ratio[0] * aspect, high = crop->ratio[1] * aspect;
    double log_low = log(low), log_high = log(high), area = (double)height * width;
    box->flip = uniform(key, STREAM_FLIP) < crop->flip;
    for (int t = 0; t < 10; t++) {
        double u = uniform(key, STREAM_AREA + t), v = uniform(key, STREAM_RATIO + t);
        double target = area * (crop->scale[0] + u * (crop->scale[1] - crop->scale[0]));
        double ratio = exp(log_low + v * (log_high - log_low));
        double w = rint(sqrt(target * ratio)), h = rint(sqrt(target / ratio));
        if (0 < w && w <= width && 0 < h && h <= height) {
            box->width = (int)w;
            box->height = (int)h;
            box->top = (int)(uniform(key, STREAM_TOP + t) * (height - h + 1));
            box->left = (int)(uniform(key, STREAM_LEFT + t) * (width - w + 1));
            return;
        }
    }
    double ratio = (double)width / height;
    box->width = width;
    box->height = height;
    if (ratio < low) box->height = (int)fmin(height, fmax(1, rint(width / low)));
    else if (ratio > high) box->width = (int)fmin(width, fmax(1, rint(height * high)));
    box->top = (height - box->height) / 2;
    box->left = (width - box->width) / 2;
}

#include "resample_fast.h"
#include "resample_exact.h"

static int fast, bmi2, use_entropy; /* AVX2; BMI2; Huffman decoding with entropy.h */

/* ---- lines of an image, one after another ---- */

typedef struct {
    const uint8_t *pixels; /* raw pixels; NULL: lines come from libjpeg */
    uint8_t *line;
    int left, stride;             /* column of a line's first pixel; bytes of a raw line */
    int64_t remaining, wide_load; /* bytes to the image's end; bytes that wide loads of a line may touch */
} Lines;

static void check_header(Scratch *s, const uint8_t *bytes, const Row *row) {
    struct jpeg_decompress_struct *j = &s->jpeg;
    jpeg_mem_src(j, (unsigned char *)bytes, row->size);
    jpeg_read_header(j, TRUE);
    if ((int)j->image_width != row->width || (int)j->image_height != row->height) {
        snprintf(s->errors.text, sizeof s->errors.text, "the JPEG is %u x %u, the beton says %d x %d",
                 j->image_height, j->image_width, row->height, row->width);
        longjmp(s->errors.escape, SHAPE);
    }
    if (j->num_components != 1 && j->num_components != 3) {
        snprintf(s->errors.text, sizeof s->errors.text, "a JPEG of %d components, not grey or RGB", j->num_components);
        longjmp(s->errors.escape, COLOUR);
    }
}

/* libjpeg's entropy decoder, whose method is replaced. Its first two members are the same in every version. */
struct jpeg_entropy_decoder {
    void (*start_pass)(j_decompress_ptr);
    boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW *);
};

static boolean decode_mcu(j_decompress_ptr j, JBLOCKROW *blocks) {
    Scratch *s = (Scratch *)j;
    if (!entropy_mcu(&s->entropy, j, blocks)) longjmp(s->errors.escape, AGAIN);
    return TRUE;
}

#ifdef AVX2
__attribute__((target("bmi,bmi2"))) static boolean decode_mcu_bmi2(j_decompress_ptr j, JBLOCKROW *blocks) {
    Scratch *s = (Scratch *)j;
    if (!entropy_mcu(&s->entropy, j, blocks)) longjmp(s->errors.escape, AGAIN);
    return TRUE;
}
#else
#define decode_mcu_bmi2 decode_mcu
#endif

static void start_decompress(Scratch *s) {
    struct jpeg_decompress_struct *j = &s->jpeg;
    jpeg_start_decompress(j);
    int baseline = !j->progressive_mode && !j->arith_code && j->data_precision == 8 && !j->Ss && j->Se == DCTSIZE2 - 1;
    s->use_entropy = s->use_entropy && baseline && !jpeg_has_multiple_scans(j) && entropy_start(&s->entropy, j);
    if (s->use_entropy) j->entropy->decode_mcu = bmi2 ? decode_mcu_bmi2 : decode_mcu;
}

/* Call after the last line. Damaged codes often resynchronise and leave bytes over; bytes before the end are damage. */
static void finish_decompress(Scratch *s) {
    if (!s->use_entropy) jpeg_finish_decompress(&s->jpeg);
    else if (!entropy_ends_at(&s->entropy, JPEG_EOI)) longjmp(s->errors.escape, AGAIN);
}

/* Lines from `top` on, at least columns left to right; wide loads may run `past` pixels over a line's end. */
static Lines lines_open(Scratch *s, const uint8_t *bytes, const Row *row, int top, int left, int right, int past) {
    uint8_t *line = take_line(s, 3 * ((size_t)row->width + past));
    if (row->mode == RAW) {
        int stride = 3 * row->width;
        return (Lines){bytes + (size_t)top * stride, line, 0, stride, (int64_t)(row->height - top) * stride,
                       stride + 3 * past};
    }
    struct jpeg_decompress_struct *j = &s->jpeg;
    check_header(s, bytes, row);
    j->out_color_space = JCS_RGB;
    j->dct_method = JDCT_ISLOW;
    j->do_fancy_upsampling = TRUE;
    start_decompress(s);
    int block = j->max_h_samp_factor * DCTSIZE; /* one more block on each side, which fancy upsampling reads */
    JDIMENSION x = left / block * block, width;
    x = x > (JDIMENSION)block ? x - block : 0;
    width = (right + block < row->width ? (JDIMENSION)(right + block) : (JDIMENSION)row->width) - x;
    jpeg_crop_scanline(j, &x, &width);
    if (top) jpeg_skip_scanlines(j, top);
    return (Lines){NULL, line, (int)x, 0, 0, 0};
}

static const uint8_t *lines_next(Scratch *s, Lines *lines) {
    if (lines->pixels) {
        const uint8_t *line = lines->pixels;
        lines->pixels += lines->stride;
        /* a copy, where a wide load would pass the image's end */
        if (lines->remaining < lines->wide_load) line = memcpy(lines->line, line, lines->stride);
        lines->remaining -= lines->stride;
        return line;
    }
    jpeg_read_scanlines(&s->jpeg, &lines->line, 1);
    return lines->line;
}

static Kernel kernel(Scratch *s, int in, float in0, float in1, int out, int cubic) {
    Kernel k;
    size_t size = kernel_size(in0, in1, out, cubic);
    k.bounds = take(s, sizeof(int) * 2 * ((size_t)out + 7));
    k.weights = take(s, sizeof(int32_t) * out * size);
    kernel_fill(&k, in, in0, in1, out, cubic, take(s, sizeof(double) * size));
    memset(k.bounds + 2 * out, 0, sizeof(int) * 2 * 7);
    k.halves = NULL;
    return k;
}

static void across(const uint8_t *in, uint8_t *out, int width, const Kernel *k) {
#ifdef AVX2
    if (k->halves) return across_avx2(in, out, width, k);
#endif
    across_portable(in, out, width, k);
}

static void down(const uint8_t *const *lines, int count, const int32_t *w, int length, uint8_t *out) {
#ifdef AVX2
    if (fast && length >= 32 && count <= MOST_COUNT) return down_avx2(lines, count, w, length, out);
#endif
    down_portable(lines, count, w, length, out);
}

/* Resize the box (left, top, right, bottom) of an image to out (h, w, 3), as Pillow does. */
static void resample(Scratch *s, const uint8_t *bytes, const Row *row, const float box[4], int cubic, int h, int w,
                     uint8_t *out) {
    Kernel kx = kernel(s, row->width, box[0], box[2], w, cubic);
    Kernel ky = kernel(s, row->height, box[1], box[3], h, cubic);
    int top = ky.bounds[0], left = kx.bounds[0], right = kx.bounds[2 * w - 2] + kx.bounds[2 * w - 1];
    Lines lines = lines_open(s, bytes, row, top, left, right, kx.size + 8);
    uint8_t *ring = take(s, (size_t)ky.size * w * 3);
    for (int x = 0; x < w; x++) kx.bounds[2 * x] -= lines.left;
#ifdef AVX2
    if (fast && kx.needed) halves_fill(&kx, w, kx.halves = take(s, sizeof(int16_t) * halves_size(&kx, w)));
#endif
    const uint8_t *wanted[ky.size];
    for (int y = 0, read = top; y < h; y++) {
        int first = ky.needed ? ky.bounds[2 * y] : y, count = ky.needed ? ky.bounds[2 * y + 1] : 1;
        for (; read < first + count; read++) {
            const uint8_t *line = lines_next(s, &lines);
            uint8_t *to = ky.needed ? ring + (size_t)(read % ky.size) * w * 3 : out + (size_t)y * w * 3;
            if (kx.needed) across(line, to, w, &kx);
            else memcpy(to, line - 3 * lines.left, (size_t)w * 3);
        }
        if (!ky.needed) continue;
        for (int r = 0; r < count; r++) wanted[r] = ring + (size_t)((first + r) % ky.size) * w * 3;
        down(wanted, count, ky.weights + y * ky.size, w * 3, out + (size_t)y * w * 3);
    }
}

#include "train_crop.h"

/* ---- one row ---- */

typedef struct {
    const uint8_t *data;
    const Row *descriptors;
    const int64_t *rows;
    const uint64_t *keys;
    const Crop *crop; /* NULL: evaluation */
    double factor;
    int cubic, h, w;
    int64_t n;
    uint8_t *out;
    Fault *fault;
    atomic_long next;
    atomic_flag writing;
} Job;

/* The largest centred box of the target's aspect, shrunk by `factor`; 0 or less: the whole image. */
API void ff_eval_box(int height, int width, int h, int w, double factor, float *box) {
    if (factor <= 0) {
        box[0] = box[1] = 0;
        box[2] = (float)width;
        box[3] = (float)height;
        return;
    }
    double a = (double)width / w, b = (double)height / h, scale = (a < b ? a : b) / factor;
    double left = (width - w * scale) / 2, top = (height - h * scale) / 2;
    box[0] = (float)fmax(left, 0);
    box[1] = (float)fmax(top, 0);
    box[2] = (float)fmin(left + w * scale, width);
    box[3] = (float)fmin(top + h * scale, height);
}

static void train_row(Scratch *s, const Job *job, const uint8_t *bytes, const Row *row, uint64_t key, uint8_t *out) {
    Box b;
    ff_crop_box(key, row->height, row->width, job->h, job->w, job->crop, &b);
    (row->mode == RAW ? train_raw : train_jpeg)(s, bytes, row, &b, job->h, job->w, out);
}

static int guarded(Scratch *s, const Job *job, const uint8_t *bytes, const Row *row, uint64_t key, uint8_t *out) {
    s->use_entropy = use_entropy;
    int code = setjmp(s->errors.escape);
    if (code) jpeg_abort_decompress(&s->jpeg);
    if (code == AGAIN) s->use_entropy = 0; /* libjpeg decides whether this is damage */
    else if (code) return code;
    s->used = 0;
    if (row->mode == RAW && row->size != (uint64_t)row->height * row->width * 3) {
        snprintf(s->errors.text, sizeof s->errors.text, "%llu bytes of pixels for %d x %d",
                 (unsigned long long)row->size, row->height, row->width);
        return SHAPE;
    }
    if (job->crop) {
        train_row(s, job, bytes, row, key, out);
    } else {
        float box[4];
        ff_eval_box(row->height, row->width, job->h, job->w, job->factor, box);
        resample(s, bytes, row, box, job->cubic, job->h, job->w, out);
    }
    int is_whole_file = row->mode == JPEG && !job->crop && job->factor < 0; /* not a row of a beton */
    if (is_whole_file) finish_decompress(s);
    jpeg_abort_decompress(&s->jpeg);
    return OK;
}

static void report(Job *job, int64_t position, int code, const char *text) {
    while (atomic_flag_test_and_set(&job->writing)) {}
    if (job->fault->position < 0 || position < job->fault->position) {
        job->fault->position = position;
        job->fault->code = code;
        snprintf(job->fault->text, sizeof job->fault->text, "%s", text);
    }
    atomic_flag_clear(&job->writing);
}

/* ---- a batch on several threads; each takes the next row, so a slow row delays no thread but its own ---- */

static void *worker(void *argument) {
    Job *job = argument;
    Scratch *s = scratch_take();
    for (;;) {
        int64_t i = atomic_fetch_add(&job->next, 1);
        if (i >= job->n) break;
        if (!s) {
            report(job, i, MEMORY, "out of memory");
            continue;
        }
        const Row *row = &job->descriptors[job->rows[i]];
        uint8_t *out = job->out + (size_t)i * job->h * job->w * 3;
        int code = guarded(s, job, job->data + row->offset, row, job->keys ? job->keys[i] : 0, out);
        if (code) report(job, i, code, s->errors.text);
    }
    if (s) scratch_put(s);
    return NULL;
}

static void batch(Job *job, int threads) {
    pthread_t helpers[64];
    int started = 0;
    job->fault->position = -1;
    atomic_init(&job->next, 0);
    atomic_flag_clear(&job->writing);
    if (threads > 65) threads = 65;
    if (threads > job->n) threads = (int)job->n;
    while (started < threads - 1 && !pthread_create(&helpers[started], NULL, worker, job)) started++;
    worker(job);
    for (int i = 0; i < started; i++) pthread_join(helpers[i], NULL);
}

API void ff_train(const uint8_t *data, const Row *descriptors, const int64_t *rows, const uint64_t *keys, int64_t n,
                  uint8_t *out, int h, int w, const Crop *crop, int threads, Fault *fault) {
    Job job = {.data = data, .descriptors = descriptors, .rows = rows, .keys = keys, .n = n, .out = out,
               .h = h, .w = w, .crop = crop, .fault = fault};
    batch(&job, threads);
}

API void ff_eval(const uint8_t *data, const Row *descriptors, const int64_t *rows, int64_t n, uint8_t *out, int h,
                 int w, double factor, int cubic, int threads, Fault *fault) {
    Job job = {.data = data, .descriptors = descriptors, .rows = rows, .n = n, .out = out, .h = h, .w = w,
               .factor = factor, .cubic = cubic, .fault = fault};
    batch(&job, threads);
}

/* ---- lower bounds for the benchmark: libjpeg's full decode (0), or almost only its entropy decoding (1) ---- */

API int64_t ff_limit(const uint8_t *bytes, uint64_t size, int64_t entropy_only) {
    Scratch *s = scratch_take();
    if (!s) return MEMORY;
    int code = setjmp(s->errors.escape);
    if (!code) {
        struct jpeg_decompress_struct *j = &s->jpeg;
        s->used = 0;
        jpeg_mem_src(j, (unsigned char *)bytes, size);
        jpeg_read_header(j, TRUE);
        j->out_color_space = JCS_RGB;
        j->dct_method = JDCT_IFAST;
        j->do_fancy_upsampling = FALSE;
        jpeg_start_decompress(j);
        if (entropy_only) jpeg_skip_scanlines(j, j->output_height - 1);
        JSAMPROW line = take_line(s, 3 * (size_t)j->output_width);
        while (j->output_scanline < j->output_height) jpeg_read_scanlines(j, &line, 1);
    }
    jpeg_abort_decompress(&s->jpeg);
    scratch_put(s);
    return code;
}

/* ---- features of this processor and this libjpeg ---- */

/* Whether entropy.h runs in place of libjpeg's Huffman decoder and gives the same pixels. */
static int entropy_agrees(void) {
    enum { SIDE = 61 };
    uint8_t pixels[3 * SIDE * SIDE], decoded[2][sizeof pixels], *bytes = NULL, *line = pixels;
    unsigned long size = 0;
    struct jpeg_compress_struct c;
    Errors errors;
    Scratch *s = scratch_take();
    c.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = on_error;
    if (!s || setjmp(errors.escape)) return 0;
    for (unsigned i = 0; i < sizeof pixels; i++) pixels[i] = (uint8_t)(i / SIDE + (hash64(i) >> 58));
    jpeg_create_compress(&c);
    jpeg_mem_dest(&c, &bytes, &size);
    c.image_width = c.image_height = SIDE;
    c.input_components = 3;
    c.in_color_space = JCS_RGB;
    jpeg_set_defaults(&c);
    c.restart_interval = 5; /* 3 restarts in 16 MCUs */
    jpeg_start_compress(&c, TRUE);
    for (int y = 0; y < SIDE; y++, line += 3 * SIDE) jpeg_write_scanlines(&c, &line, 1);
    jpeg_finish_compress(&c);
    jpeg_destroy_compress(&c);
    Row row = {0, size, SIDE, SIDE, JPEG, 0};
    Job job = {.factor = 1, .h = SIDE, .w = SIDE};
    int agrees = 1;
    for (use_entropy = 0; use_entropy < 2; use_entropy++)
        agrees &= guarded(s, &job, bytes, &row, 0, decoded[use_entropy]) == OK;
    agrees &= s->use_entropy && s->entropy.restart == 3 && !memcmp(decoded[0], decoded[1], sizeof pixels);
    free(bytes);
    scratch_put(s);
    return agrees;
}

__attribute__((constructor)) static void detect(void) {
#ifdef AVX2
    fast = __builtin_cpu_supports("avx2") != 0;
    bmi2 = fast && __builtin_cpu_supports("bmi2");
#endif
    use_entropy = entropy_agrees();
}

/* For tests: portable code and libjpeg's entropy decoding (1), or the fastest (0). Returns 1 if entropy.h is in use. */
API int ff_portable(int on) {
    fast = bmi2 = use_entropy = 0;
    if (!on) detect();
    return use_entropy;
}
