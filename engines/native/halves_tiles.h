/* The forms of a product with weights in 16 bits, in vectors that halves.c defines. Every sum over
 * inputs is one chain of fused multiply-adds from the first input to the last in all of them, but
 * for transposed weights, where each lane of a vector has a chain of its own. */

#define VECTORS (PANEL / LANES)
#define CHUNK 8 /* inputs that few rows take at a time: so many rows of w are read side by side */
#define AHEAD 8192 /* bytes of weights */
#define FILLED_AHEAD 6 /* inputs */

/* How many inputs before they are needed weights of `of` are fetched from memory, from k on. */
TARGET INLINE size_t NAME(ahead)(const struct halves *call, struct span of, size_t k,
                                 size_t depth) {
  size_t width = (of.last - of.first) * sizeof(uint16_t);
  return least(AHEAD / (width + 1) / CHUNK * CHUNK + CHUNK, call->inputs - k - depth);
}

TARGET INLINE VECTOR NAME(upcast)(const uint16_t *w, const enum half kind) {
  return kind == HALF_FP16 ? FROM_FP16(w) : FROM_BF16(w);
}

/* -- what follows a product -- */

/* e^x, for x up to 88; below -87 it stays at e^-87. */
TARGET INLINE VECTOR NAME(exponential)(VECTOR x) {
  x = MULTIPLY(x, SAME(1.44269504f));
  x = LEAST(SAME(126.0f), x); /* a NaN stays one */
  x = MOST(SAME(-126.0f), x);
  VECTOR whole = WHOLE(x), part = ADD(x, MULTIPLY(whole, SAME(-1.0f)));
  VECTOR y = FMA(SAME(1.5403530e-4f), part, SAME(1.3333558e-3f));
  y = FMA(y, part, SAME(9.6181291e-3f));
  y = FMA(y, part, SAME(5.5504109e-2f));
  y = FMA(y, part, SAME(2.4022651e-1f));
  y = FMA(y, part, SAME(6.9314718e-1f));
  y = FMA(y, part, SAME(1.0f));
  return MULTIPLY(y, TWO_TO(whole));
}

TARGET INLINE VECTOR NAME(finished)(const struct halves *call, VECTOR y, const float *bias,
                                    const float *other) {
  if (bias != NULL) y = ADD(y, LOAD(bias));
  if (call->alpha != 0.0f) {
    VECTOR e = NAME(exponential)(MULTIPLY(y, SAME(-call->alpha)));
    y = DIVIDE(y, ADD(SAME(1.0f), e));
  }
  if (call->joined == JOINED_SUM) y = ADD(y, LOAD(other));
  if (call->joined == JOINED_PRODUCT) y = MULTIPLY(y, LOAD(other));
  return y;
}

TARGET static void NAME(finish)(const struct halves *call, struct span of, struct span rows) {
  if (call->bias == NULL && call->alpha == 0.0f && !call->joined) return;
  for (size_t r = rows.first; r < rows.last; r++) {
    float *y = call->y + r * call->outputs;
    const float *other = call->joined ? call->other + r % call->others * call->outputs : NULL;
    size_t c = of.first;
    for (; c + LANES <= of.last; c += LANES)
      STORE(y + c, NAME(finished)(call, LOAD(y + c), call->bias ? call->bias + c : NULL,
                                  other ? other + c : NULL));
    if (c == of.last) continue;
    size_t bytes = (of.last - c) * sizeof *y;
    float values[LANES] = {0}, biases[LANES] = {0}, others[LANES] = {0};
    memcpy(values, y + c, bytes);
    if (call->bias != NULL) memcpy(biases, call->bias + c, bytes);
    if (other != NULL) memcpy(others, other + c, bytes);
    STORE(values, NAME(finished)(call, LOAD(values), call->bias ? biases : NULL, others));
    memcpy(y + c, values, bytes);
  }
}

/* -- few rows -- */

/* Adds the products of `depth` inputs from `k` on with a vector of outputs to y, whose rows lie
 * `stride` apart. */
TARGET INLINE void NAME(add)(const struct halves *call, const uint16_t *w, size_t w_stride,
                             float *y, size_t stride, size_t k, const size_t depth,
                             const enum half kind) {
  VECTOR weights[CHUNK];
  for (size_t d = 0; d < depth; d++) weights[d] = NAME(upcast)(w + d * w_stride, kind);
  for (size_t r = 0; r < call->rows; r++) {
    const float *x = call->x + r * call->inputs + k;
    VECTOR sum = k > 0 ? LOAD(y + r * stride) : ZERO;
    for (size_t d = 0; d < depth; d++) sum = FMA(SAME(x[d]), weights[d], sum);
    STORE(y + r * stride, sum);
  }
}

TARGET INLINE void NAME(chunk)(const struct halves *call, struct span of, size_t k,
                               const size_t depth, const enum half kind) {
  size_t n = call->outputs, ahead = NAME(ahead)(call, of, k, depth);
  const uint16_t *w = call->w + k * n;
  size_t c = of.first;
  for (; c + LANES <= of.last; c += LANES) {
    if ((c - of.first) % 32 == 0)
      for (size_t d = 0; d < depth; d++)
        _mm_prefetch((const char *)(w + (d + ahead) * n + c), _MM_HINT_T0);
    NAME(add)(call, w + c, n, call->y + c, n, k, depth, kind);
  }
  if (c == of.last) return;
  uint16_t rest[CHUNK * LANES] = {0};
  float sums[FEW * LANES];
  size_t left = of.last - c;
  for (size_t d = 0; d < depth; d++) memcpy(rest + d * LANES, w + d * n + c, left * sizeof *rest);
  for (size_t r = 0; r < call->rows; r++)
    memcpy(sums + r * LANES, call->y + r * n + c, left * sizeof *sums);
  NAME(add)(call, rest, LANES, sums, LANES, k, depth, kind);
  for (size_t r = 0; r < call->rows; r++)
    memcpy(call->y + r * n + c, sums + r * LANES, left * sizeof *sums);
}

/* One row: its inputs stay in registers. */
TARGET INLINE void NAME(chunk_of_one)(const struct halves *call, struct span of, size_t k,
                                      const enum half kind) {
  size_t n = call->outputs, ahead = NAME(ahead)(call, of, k, CHUNK);
  const uint16_t *w = call->w + k * n;
  VECTOR x[CHUNK];
  for (size_t d = 0; d < CHUNK; d++) x[d] = SAME(call->x[k + d]);
  for (size_t c = of.first; c + LANES <= of.last; c += LANES) {
    VECTOR sum = k > 0 ? LOAD(call->y + c) : ZERO;
    if ((c - of.first) % 32 == 0)
      for (size_t d = 0; d < CHUNK; d++)
        _mm_prefetch((const char *)(w + (d + ahead) * n + c), _MM_HINT_T0);
    for (size_t d = 0; d < CHUNK; d++) sum = FMA(x[d], NAME(upcast)(w + d * n + c, kind), sum);
    STORE(call->y + c, sum);
  }
}

TARGET INLINE void NAME(few_of)(const struct halves *call, struct span of, const enum half kind) {
  size_t k = 0, whole = (of.last - of.first) / LANES * LANES + of.first;
  struct span vectors = {of.first, whole}, rest = {whole, of.last};
  for (; k + CHUNK <= call->inputs; k += CHUNK) {
    if (call->rows == 1) {
      NAME(chunk_of_one)(call, vectors, k, kind);
      NAME(chunk)(call, rest, k, CHUNK, kind);
    } else {
      NAME(chunk)(call, of, k, CHUNK, kind);
    }
  }
  for (; k < call->inputs; k++) NAME(chunk)(call, of, k, 1, kind);
}

TARGET static int NAME(few)(const struct halves *call, struct span of) {
  if (call->kind == HALF_FP16)
    NAME(few_of)(call, of, HALF_FP16);
  else
    NAME(few_of)(call, of, HALF_BF16);
  NAME(finish)(call, of, (struct span){0, call->rows});
  return 0;
}

/* -- many rows -- */

#define STRIDE (DEEP * PANEL + 16) /* of panels, in other sets of the cache */

/* block [panels][deep][PANEL], panels STRIDE apart, of the weights of inputs k.. and of the outputs
 * of `of`, as floats; outputs that are not there are 0. */
TARGET INLINE void NAME(fill)(const struct halves *call, struct span of, size_t k, size_t deep,
                              float *block, const enum half kind) {
  size_t n = call->outputs, left = call->inputs - k;
  for (size_t d = 0; d < deep; d++) {
    const uint16_t *w = call->w + (k + d) * n;
    const uint16_t *ahead = w + least(FILLED_AHEAD, left - d - 1) * n;
    float *to = block + d * PANEL;
    for (size_t c = of.first; c < of.last; c += PANEL, to += STRIDE) {
      uint16_t rest[PANEL];
      const uint16_t *from = w + c;
      _mm_prefetch((const char *)(ahead + c), _MM_HINT_T0);
      if (c + PANEL > n) {
        memset(rest, 0, sizeof rest);
        memcpy(rest, from, (n - c) * sizeof *rest);
        from = rest;
      }
      for (size_t v = 0; v < PANEL; v += LANES) STORE(to + v, NAME(upcast)(from + v, kind));
    }
  }
}

#define ROW (DEEP + 16) /* rows in a tile lie so far apart: in other sets of the cache */

/* y [TILE][PANEL] = x [TILE][ROW] * panel [deep][PANEL], on top of what is there if `more`. */
TARGET INLINE void NAME(tile)(const float *x, const float *panel, size_t deep, float *y,
                              size_t stride, int more) {
  VECTOR sums[TILE][VECTORS];
#pragma GCC unroll 16
  for (size_t r = 0; r < TILE; r++)
#pragma GCC unroll 4
    for (size_t v = 0; v < VECTORS; v++)
      sums[r][v] = more ? LOAD(y + r * stride + v * LANES) : ZERO;
  for (size_t k = 0; k < deep; k++) {
    VECTOR weights[VECTORS];
#pragma GCC unroll 4
    for (size_t v = 0; v < VECTORS; v++) weights[v] = LOAD(panel + k * PANEL + v * LANES);
#pragma GCC unroll 16
    for (size_t r = 0; r < TILE; r++) {
      VECTOR one = SAME(x[r * ROW + k]);
#pragma GCC unroll 4
      for (size_t v = 0; v < VECTORS; v++) sums[r][v] = FMA(one, weights[v], sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (size_t r = 0; r < TILE; r++)
#pragma GCC unroll 4
    for (size_t v = 0; v < VECTORS; v++) STORE(y + r * stride + v * LANES, sums[r][v]);
}

/* The same where the tile goes beyond the rows or the outputs. */
TARGET static void NAME(edge)(const struct halves *call, const float *x, const float *panel,
                              size_t deep, size_t r, size_t c, int more) {
  float sums[TILE * PANEL];
  size_t n = call->outputs, rows = least(TILE, call->rows - r), wide = least(PANEL, n - c);
  for (size_t i = 0; i < rows && more; i++)
    memcpy(sums + i * PANEL, call->y + (r + i) * n + c, wide * sizeof *sums);
  NAME(tile)(x, panel, deep, sums, PANEL, more);
  for (size_t i = 0; i < rows; i++)
    memcpy(call->y + (r + i) * n + c, sums + i * PANEL, wide * sizeof *sums);
}

TARGET static void NAME(panels)(const struct halves *call, struct span of, size_t r, size_t k,
                                size_t deep, const float *x, const float *block) {
  size_t n = call->outputs;
  for (size_t c = of.first; c < of.last; c += PANEL, block += STRIDE) {
    if (k > 0 && c + PANEL < of.last) /* what the next tile adds to */
      for (size_t i = r; i < least(r + TILE, call->rows); i++)
        for (size_t v = 0; v < PANEL; v += 16)
          _mm_prefetch((const char *)(call->y + i * n + c + PANEL + v), _MM_HINT_T0);
    if (r + TILE <= call->rows && c + PANEL <= n)
      NAME(tile)(x, block, deep, call->y + r * n + c, n, k > 0);
    else
      NAME(edge)(call, x, block, deep, r, c, k > 0);
  }
}

/* x to y, while what lies `ahead` of x begins to be read. */
TARGET INLINE void NAME(copy)(const float *x, size_t ahead, size_t deep, float *y) {
  size_t i = 0;
  for (; i + LANES <= deep; i += LANES) {
    if (i % 16 == 0) _mm_prefetch((const char *)x + (i + ahead) * sizeof *x, _MM_HINT_T0);
    STORE(y + i, LOAD(x + i));
  }
  for (; i < deep; i++) y[i] = x[i];
}

TARGET static int NAME(many)(const struct halves *call, struct span of, struct span rows) {
  size_t panels = ceiling(of.last - of.first, PANEL);
  float *block = aligned_alloc(64, panels * STRIDE * sizeof *block);
  float x[TILE * ROW] __attribute__((aligned(64))) = {0};
  if (block == NULL) return -1;
  for (size_t k = 0; k < call->inputs; k += DEEP) {
    size_t deep = least(DEEP, call->inputs - k);
    if (call->kind == HALF_FP16)
      NAME(fill)(call, of, k, deep, block, HALF_FP16);
    else
      NAME(fill)(call, of, k, deep, block, HALF_BF16);
    for (size_t r = rows.first; r < rows.last; r += TILE) {
      for (size_t i = 0; i < TILE && r + i < call->rows; i++)
        NAME(copy)(call->x + (r + i) * call->inputs + k, TILE * call->inputs, deep, x + i * ROW);
      NAME(panels)(call, of, r, k, deep, x, block);
      if (k + deep == call->inputs)
        NAME(finish)(call, of, (struct span){r, least(r + TILE, call->rows)});
    }
  }
  free(block);
  return 0;
}

/* -- transposed weights -- */

#define DOTS 8 /* outputs at a time of one row, 4 of several */

/* Products of `rows` rows and `outputs` outputs, from r and c on. */
TARGET INLINE void NAME(some_dots)(const struct halves *call, size_t r, const size_t rows, size_t c,
                                   const size_t outputs, const enum half kind) {
  size_t inputs = call->inputs, whole = inputs / LANES * LANES;
  const float *x = call->x + r * inputs;
  const uint16_t *w = call->w + c * inputs;
  VECTOR sums[4][DOTS];
#pragma GCC unroll 4
  for (size_t i = 0; i < rows; i++)
#pragma GCC unroll 8
    for (size_t o = 0; o < outputs; o++) sums[i][o] = ZERO;
  for (size_t k = 0; k < whole; k += LANES) {
#pragma GCC unroll 8
    for (size_t o = 0; o < outputs; o++) {
      VECTOR weights = NAME(upcast)(w + o * inputs + k, kind);
#pragma GCC unroll 4
      for (size_t i = 0; i < rows; i++) sums[i][o] = FMA(LOAD(x + i * inputs + k), weights, sums[i][o]);
    }
  }
  if (whole < inputs) {
    size_t left = inputs - whole;
    for (size_t o = 0; o < outputs; o++) {
      uint16_t rest[LANES] = {0};
      memcpy(rest, w + o * inputs + whole, left * sizeof *rest);
      for (size_t i = 0; i < rows; i++) {
        float last[LANES] = {0};
        memcpy(last, x + i * inputs + whole, left * sizeof *last);
        sums[i][o] = FMA(LOAD(last), NAME(upcast)(rest, kind), sums[i][o]);
      }
    }
  }
  for (size_t i = 0; i < rows; i++)
    for (size_t o = 0; o < outputs; o++)
      call->y[(r + i) * call->outputs + c + o] = SUM(sums[i][o]);
}

TARGET INLINE void NAME(dots_of)(const struct halves *call, struct span of, const enum half kind) {
  size_t c = of.first;
  for (; c + DOTS <= of.last; c += DOTS) {
    size_t r = 0;
    for (; r + 4 <= call->rows; r += 4) {
      NAME(some_dots)(call, r, 4, c, 4, kind);
      NAME(some_dots)(call, r, 4, c + 4, 4, kind);
    }
    for (; r < call->rows; r++) NAME(some_dots)(call, r, 1, c, DOTS, kind);
  }
  for (; c < of.last; c++)
    for (size_t r = 0; r < call->rows; r++) NAME(some_dots)(call, r, 1, c, 1, kind);
}

TARGET static int NAME(dots)(const struct halves *call, struct span of) {
  if (call->kind == HALF_FP16)
    NAME(dots_of)(call, of, HALF_FP16);
  else
    NAME(dots_of)(call, of, HALF_BF16);
  NAME(finish)(call, of, (struct span){0, call->rows});
  return 0;
}

#undef VECTORS
#undef CHUNK
#undef AHEAD
#undef FILLED_AHEAD
#undef STRIDE
#undef ROW
#undef DOTS
