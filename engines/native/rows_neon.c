/* Rows on 64-bit ARM. */

#if defined(__aarch64__)

#include "vector_neon.h"
#define FORM_OF(name) name##_neon
#include "rows_body.h"

#endif
