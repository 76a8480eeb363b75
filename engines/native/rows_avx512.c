/* Rows with AVX-512. */

#if defined(__x86_64__)

#include "vector_avx512.h"
#define FORM_OF(name) name##_avx512
#include "rows_body.h"

#endif
