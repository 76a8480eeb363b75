/* Rows with AVX2. */

#if defined(__x86_64__)

#include "vector_avx2.h"
#define FORM_OF(name) name##_avx2
#include "rows_body.h"

#endif
