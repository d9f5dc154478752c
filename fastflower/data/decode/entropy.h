/* Huffman decoding of a baseline JPEG in memory, in place of libjpeg's, with the same coefficients.
 *
 * One look-up gives run, size and value of nearly every coefficient, and whether the block ends after it; stuffing is
 * removed in advance, and bytes are loaded eight at a time while the look-up is under way. Anything that looks like
 * damage is left to libjpeg: the caller decodes the row again with libjpeg, whose verdict stands.
 */

#define LOOK 10                                                  /* bits of a look-up; a larger table leaves L1 cache */
#define MOST_BITS 31                                             /* of a coefficient: 16 of code, 15 of value */
#define MCU_ROOM (D_MAX_BLOCKS_IN_MCU * 64 * MOST_BITS / 8 + 80) /* bytes that decoding one MCU may touch */
#define CHUNK (4 * MCU_ROOM)

/* An entry: value << 16 | bits of the end-of-block code, if looked up too << 12 | run << 8 | flags | bits.
 * UNFINISHED: the value does not fit and `bits` counts the code only; bits 0: the code does not fit either. */
enum { LAST = 0x40, UNFINISHED = 0x80 };
#define BITS(entry) ((entry) & 63)
#define RUN(entry) ((entry) >> 8 & 15)
#define END_BITS(entry) ((entry) >> 12 & 15)
#define VALUE(entry) ((int32_t)(entry) >> 16)

typedef struct {
    uint32_t entries[1 << LOOK];
    uint32_t limit[17]; /* upper bound of the codes of each length, shifted to 16 bits */
    int32_t first[17];  /* index of the first symbol of each length, minus its code */
    JHUFF_TBL source;   /* the table this was filled from */
} Huffman;

typedef struct {
    uint64_t bits;       /* the next bits, from the top */
    int count;           /* valid bits; those below are right too, and are loaded again */
    const uint8_t *next; /* the bytes after them */
} Bits;                  /* passed by value, to stay in registers */

typedef struct {
    Huffman dc[NUM_HUFF_TBLS], ac[NUM_HUFF_TBLS];
    struct {
        const Huffman *dc, *ac;
        uint32_t *last; /* DC value of the component; wraps around, as libjpeg's does */
    } blocks[D_MAX_BLOCKS_IN_MCU];
    uint32_t last[MAX_COMPS_IN_SCAN];
    unsigned until_restart, restart;
    const uint8_t *source, *source_end; /* bytes of the file that are not in `clean` yet */
    const uint8_t *end;                 /* of the bytes in `clean` */
    int at_marker;                      /* `clean` reaches up to a marker; zeros follow `end` */
    Bits in;
    uint8_t clean[CHUNK + MCU_ROOM];
} Entropy;

static const uint8_t natural[64 + 16] = { /* order of zigzag indices; damaged data may index past the block */
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,
    7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46,
    53, 60, 61, 54, 47, 55, 62, [63 ... 79] = 63,
};

static inline int32_t extended(uint32_t value, int size) { /* figure F.12 of the standard */
    return (int32_t)value - (value >> (size - 1) ? 0 : (1 << size) - 1);
}

/* The entry of a symbol with a code of `length` bits; `rest` holds the `spare` bits of the look-up after the code. */
static uint32_t entry_of(int symbol, int length, uint32_t rest, int spare, uint32_t end_code, int end_length) {
    int run = symbol >> 4, size = symbol & 15;
    if (!size) return (uint32_t)(run == 15 ? 15 << 8 | length : LAST | length); /* 16 zeros; end of block */
    if (spare < size) return (uint32_t)(UNFINISHED | length | symbol << 16);
    spare -= size;
    uint32_t entry = (uint32_t)extended(rest >> spare, size) << 16 | (uint32_t)(run << 8 | (length + size));
    if (!end_length || spare < end_length || (rest >> (spare - end_length) & ((1u << end_length) - 1)) != end_code)
        return entry;
    return (entry | LAST | (uint32_t)end_length << 12) + (uint32_t)end_length;
}

/* libjpeg has already validated the table. */
static void huffman_fill(Huffman *h, const JHUFF_TBL *table, int is_dc) {
    if (!memcmp(h->source.bits, table->bits, sizeof table->bits) &&
        !memcmp(h->source.huffval, table->huffval, sizeof table->huffval))
        return; /* most files have the same tables */
    h->source = *table;
    for (int i = 0; i < 1 << LOOK; i++) h->entries[i] = UNFINISHED;
    uint32_t code = 0, end_code = 0;
    int symbol_index = 0, end_length = 0;
    for (int length = 1; length <= LOOK && !is_dc; length++, code <<= 1)
        for (int i = 0; i < table->bits[length]; i++, code++, symbol_index++)
            if (!table->huffval[symbol_index]) end_code = code, end_length = length;
    code = 0, symbol_index = 0;
    for (int length = 1; length <= 16; length++, code <<= 1) {
        h->first[length] = symbol_index - (int32_t)code;
        for (int i = 0; i < table->bits[length]; i++, code++, symbol_index++) {
            int spare = LOOK - length;
            for (uint32_t rest = 0; spare >= 0 && rest < 1u << spare; rest++)
                h->entries[code << spare | rest] =
                    entry_of(table->huffval[symbol_index], length, rest, spare, end_code, end_length);
        }
        h->limit[length] = code << (16 - length);
    }
}

/* Fill `clean` up to a marker, without the zero that follows each 0xFF. Returns 0 to leave the row to libjpeg. */
static int entropy_refill(Entropy *e) {
    uint8_t *to = e->clean, *full = e->clean + CHUNK;
    size_t kept = (size_t)(e->end - e->in.next);
    memmove(to, e->in.next, kept);
    e->in.next = to;
    for (to += kept; to < full;) {
        size_t remaining = (size_t)(e->source_end - e->source), room = (size_t)(full - to);
        size_t n = remaining < room ? remaining : room;
        const uint8_t *escape = memchr(e->source, 0xFF, n);
        if (escape) n = (size_t)(escape - e->source);
        memcpy(to, e->source, n);
        to += n, e->source += n, remaining -= n;
        for (; remaining >= 2 && escape && e->source[1] == 0xFF; remaining--) e->source++; /* skip fill bytes */
        if (remaining < 2) return 0;
        if (!escape) continue;
        e->at_marker = e->source[1] != 0;
        if (e->at_marker) break;
        if (e->source > escape) return 0; /* 0xFF 0xFF 0 is ambiguous: libjpeg treats it as both */
        *to++ = 0xFF, e->source += 2;
    }
    e->end = to;
    if (e->at_marker) memset(to, 0, MCU_ROOM);
    return 1;
}

/* Start at the beginning of the scan: call after jpeg_start_decompress, before any line is read. */
static int entropy_start(Entropy *e, j_decompress_ptr j) {
    for (int c = 0; c < j->comps_in_scan; c++) {
        int dc = j->cur_comp_info[c]->dc_tbl_no, ac = j->cur_comp_info[c]->ac_tbl_no;
        huffman_fill(&e->dc[dc], j->dc_huff_tbl_ptrs[dc], 1);
        huffman_fill(&e->ac[ac], j->ac_huff_tbl_ptrs[ac], 0);
    }
    for (int b = 0; b < j->blocks_in_MCU; b++) {
        int c = j->MCU_membership[b];
        e->blocks[b].dc = &e->dc[j->cur_comp_info[c]->dc_tbl_no];
        e->blocks[b].ac = &e->ac[j->cur_comp_info[c]->ac_tbl_no];
        e->blocks[b].last = &e->last[c];
    }
    memset(e->last, 0, sizeof e->last);
    e->until_restart = j->restart_interval;
    e->restart = 0;
    e->source = j->src->next_input_byte;
    e->source_end = e->source + j->src->bytes_in_buffer;
    e->in = (Bits){0, 0, e->clean};
    e->end = e->clean;
    e->at_marker = 0;
    return entropy_refill(e);
}

#define INLINE static inline __attribute__((always_inline))

/* Load bits until at least 56 are valid. */
INLINE Bits refill(Bits in) {
    uint64_t eight;
    memcpy(&eight, in.next, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    eight = __builtin_bswap64(eight);
#endif
    return (Bits){in.bits | eight >> in.count, in.count | 56, in.next + ((63 - in.count) >> 3)};
}

INLINE Bits spend(Bits in, int bits) {
    return (Bits){in.bits << bits, in.count - bits, in.next};
}

/* The entry of the next coefficient for a code of any length, from its UNFINISHED entry; 0: no such code. */
static __attribute__((noinline)) uint32_t entry_long(uint64_t bits, const Huffman *h, uint32_t entry) {
    int length = BITS(entry), symbol = (int)(entry >> 16);
    if (!length) {
        uint32_t next = (uint32_t)(bits >> 48);
        for (length = LOOK + 1; length <= 16 && next >= h->limit[length];) length++;
        if (length > 16) return 0;
        symbol = h->source.huffval[((int)(next >> (16 - length)) + h->first[length]) & 255];
    }
    int spare = MOST_BITS - length;
    return entry_of(symbol, length, (uint32_t)(bits << length >> (64 - spare)), spare, 0, 0);
}

/* Whether all data before the next marker was decoded, and the marker is this one. */
static int entropy_ends_at(const Entropy *e, int marker) {
    return e->at_marker && 8 * (e->end - e->in.next) + e->in.count < 8 && e->source[1] == marker;
}

static int entropy_restart(Entropy *e, j_decompress_ptr j) {
    if (!entropy_ends_at(e, JPEG_RST0 + (int)e->restart)) return 0;
    e->source += 2;
    e->in = (Bits){0, 0, e->clean};
    e->end = e->clean;
    e->at_marker = 0;
    memset(e->last, 0, sizeof e->last);
    e->until_restart = j->restart_interval;
    e->restart = (e->restart + 1) & 7;
    return entropy_refill(e);
}

/* Decode the blocks of one MCU, zeroed by the caller; NULL: skip them. Returns 0 to leave the row to libjpeg. */
INLINE int entropy_mcu(Entropy *e, j_decompress_ptr j, JBLOCKROW *blocks) {
    if (!e->at_marker && e->end - e->in.next < MCU_ROOM && !entropy_refill(e)) return 0;
    if (j->restart_interval) {
        if (!e->until_restart && !entropy_restart(e, j)) return 0;
        e->until_restart--;
    }
    Bits in = refill(e->in);
    JBLOCK discarded;
    for (int b = 0; b < j->blocks_in_MCU; b++) {
        JCOEF *block = blocks ? blocks[b][0] : discarded;
        const Huffman *dc = e->blocks[b].dc, *ac = e->blocks[b].ac;
        uint32_t entry = dc->entries[in.bits >> (64 - LOOK)];
        in = refill(in);
        if (entry & UNFINISHED && !(entry = entry_long(in.bits, dc, entry))) return 0;
        in = spend(in, BITS(entry));
        block[0] = (JCOEF)(*e->blocks[b].last += (uint32_t)VALUE(entry));
        for (int k = 1; k < 64; k++) {
            entry = ac->entries[in.bits >> (64 - LOOK)];
            in = refill(in);
            if (__builtin_expect(entry & UNFINISHED, 0) && !(entry = entry_long(in.bits, ac, entry))) return 0;
            k += RUN(entry);
            block[natural[k]] = (JCOEF)VALUE(entry);
            if (entry & LAST) {
                /* index 63 ends a block without a code */
                in = spend(in, k < 63 ? BITS(entry) : BITS(entry) - END_BITS(entry));
                break;
            }
            in = spend(in, BITS(entry));
        }
    }
    e->in = in;
    return 8 * (e->end - in.next) + in.count >= 0; /* negative: bits past the end were used */
}
