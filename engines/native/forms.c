/* What the processor has, and which form is in use. */

#include "forms.h"

#if defined(__x86_64__)

#include <cpuid.h>

static int has_avx512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

/* Bits of CPUID that compilers before GCC 11 have no name for. */
static int has_f16c(void) {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

static int has_avx_vnni(void) {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

int form_is_here(enum form form) {
  if (form == FORM_PLAIN) return 1;
  int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  switch (form) {
    case FORM_AVX2: return avx2;
#ifndef EDGEVLM_WITHOUT_AVX_VNNI
    case FORM_AVX_VNNI: return avx2 && has_avx_vnni();
#endif
    case FORM_AVX512_VNNI: return avx2 && has_avx512();
    case FORM_AVX512_BF16: return avx2 && has_avx512() && __builtin_cpu_supports("avx512bf16");
    default: return 0;
  }
}

#elif defined(__aarch64__) && defined(__linux__)

#include <sys/auxv.h>

#define DOTPROD_OF_HWCAP (1ul << 20) /* HWCAP_ASIMDDP of asm/hwcap.h */

int form_is_here(enum form form) {
  return form == FORM_PLAIN || (form == FORM_DOTPROD && (getauxval(AT_HWCAP) & DOTPROD_OF_HWCAP));
}

#else

int form_is_here(enum form form) { return form == FORM_PLAIN; }

#endif

static int used = -1;

static enum form best(void) {
  int form = FORM_COUNT - 1;
  while (!form_is_here((enum form)form)) form--;
  return (enum form)form;
}

enum form form_in_use(void) {
  int form = __atomic_load_n(&used, __ATOMIC_RELAXED);
  if (form < 0) {
    form = (int)best();
    __atomic_store_n(&used, form, __ATOMIC_RELAXED);
  }
  return (enum form)form;
}

int edgevlm_form_is_here(int form) {
  return form >= 0 && form < FORM_COUNT && form_is_here((enum form)form);
}

int edgevlm_use_form(int form) {
  if (form != -1 && !edgevlm_form_is_here(form)) return -1;
  __atomic_store_n(&used, form, __ATOMIC_RELAXED);
  return 0;
}

int edgevlm_form_in_use(void) { return (int)form_in_use(); }
