/* Which instructions a kernel uses. A form is a set of them that processors have together; the
 * library holds all forms of its architecture, and asks the processor which it has.
 *
 * A kernel is written once in plain C, which runs everywhere and says what the others have to
 * compute, and once for each form that is worth it, in functions with that form's attribute:
 *
 *   switch (form_in_use()) {
 * #if defined(__x86_64__)
 *     case FORM_AVX512_BF16: case FORM_AVX512_VNNI: return twice_avx512(x, y, count);
 *     case FORM_AVX_VNNI: case FORM_AVX2: return twice_avx2(x, y, count);
 * #elif defined(__aarch64__)
 *     case FORM_DOTPROD: return twice_neon(x, y, count);
 * #endif
 *     default: return twice_plain(x, y, count);
 *   }
 */

#ifndef EDGEVLM_FORMS_H
#define EDGEVLM_FORMS_H

#include <stddef.h>

/* Of one architecture the later is the better; library.py has their names in this order. */
enum form {
  FORM_PLAIN,
  FORM_AVX2,        /* AVX2, FMA and F16C */
  FORM_AVX_VNNI,    /* these, and VNNI in registers of 256 bits */
  FORM_AVX512_VNNI, /* AVX-512 F, BW, DQ, VL and VNNI */
  FORM_AVX512_BF16, /* these, and BF16 */
  FORM_DOTPROD,     /* 64-bit ARM with 8-bit dot products */
  FORM_COUNT
};

/* The attributes of functions: nothing else in a file may use the instructions. */
#if defined(__x86_64__)
#define OF_AVX2 __attribute__((target("avx2,fma,f16c")))
#define OF_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define OF_AVX512_VNNI \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define OF_AVX512_BF16 \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")))
#elif defined(__aarch64__) && defined(__clang__)
#define OF_DOTPROD __attribute__((target("dotprod")))
#elif defined(__aarch64__)
#define OF_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

#define INLINE static inline __attribute__((always_inline))
#define EXPORTED __attribute__((visibility("default")))

/* n, or the next multiple of `to`. */
INLINE size_t rounded_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* Whether this processor has what a form needs, and the system saves its registers. */
int form_is_here(enum form form);

/* The best that is here, unless another was chosen. */
enum form form_in_use(void);

/* The same for who loads the library: -1 stands for the best; -1 back for one that is not here. */
EXPORTED int edgevlm_form_is_here(int form);
EXPORTED int edgevlm_use_form(int form);
EXPORTED int edgevlm_form_in_use(void);

#endif
