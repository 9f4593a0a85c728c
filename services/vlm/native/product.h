/* A product with a base's weight, as it is asked for. */
#include "lanes.h"

typedef uint32_t Group; /* two neighbouring inputs in bfloat16, four in eight bits, or one in float32 */

/* `inputs` and `input_stride` count groups. Of eight bits: inputs without a sign, `shift` is what that adds to each
 * output; each row has a scale and the number that all of its own were lessened by, each output a scale and what the
 * sum of its weights is. */
typedef struct {
  const Group *packed, *input;
  const void *bias;
  void *output;
  const float *row_scale, *row_middle, *output_scale, *output_sum;
  const int32_t *shift;
  int64_t rows, outputs, inputs, input_stride, output_stride;
  int bias_bfloat16, output_bfloat16;
} Product;
