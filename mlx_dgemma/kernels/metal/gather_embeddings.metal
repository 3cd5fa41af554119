// The weighted sum of the surviving tokens' embedding rows. A thread owns one packed word of every
// row (4 or 8 columns), or 4 columns of a dense table; a row of the grid is a row of the batch.
// Template: T embedding dtype, BITS 0 (dense), 4 or 8, GROUP.
//: body
    constexpr uint SPAN = BITS == 4 ? 8 : 4;  // columns per thread
    const uint H = w_shape[1] * (BITS == 0 ? 1 : SPAN);
    const uint part = thread_position_in_grid.x;
    const uint row = thread_position_in_grid.y;
    const uint column = part * SPAN;
    const uint capacity = ids_shape[1];
    const uint n = static_cast<uint>(counts[row]);
    if (column < H) {
      float sum[SPAN];
      #pragma clang loop unroll(full)
      for (uint j = 0; j < SPAN; j++) {
        sum[j] = 0.0f;
      }
      float total = 0.0f;
      for (uint s = 0; s < n; s++) {
        const ulong id = static_cast<ulong>(ids[static_cast<ulong>(row) * capacity + s]);
        const float p =
            static_cast<float>(static_cast<T>(weights[static_cast<ulong>(row) * capacity + s]));
        total += p;
        if (BITS == 0) {
          #pragma clang loop unroll(full)
          for (uint j = 0; j < SPAN; j++) {
            if (column + j < H) {
              sum[j] += p * static_cast<float>(w[id * H + column + j]);
            }
          }
        } else {
          const uint packed = static_cast<uint>(w[id * (H / SPAN) + part]);
          const ulong group = id * (H / GROUP) + column / GROUP;
          const float scale = static_cast<float>(scales[group]);
          const float bias = static_cast<float>(biases[group]);
          constexpr uint WIDTH = 32 / SPAN;
          #pragma clang loop unroll(full)
          for (uint j = 0; j < SPAN; j++) {
            const uint code = (packed >> (j * WIDTH)) & ((1u << WIDTH) - 1u);
            sum[j] += p * static_cast<float>(static_cast<T>(scale * static_cast<float>(code) + bias));
          }
        }
      }
      const float scaled = static_cast<float>(factor[0]);
      #pragma clang loop unroll(full)
      for (uint j = 0; j < SPAN; j++) {
        if (column + j < H) {
          const T mean = static_cast<T>(total > 0.0f ? sum[j] / total : 0.0f);
          y[static_cast<ulong>(row) * H + column + j] =
              static_cast<T>(static_cast<float>(mean) * scaled);
        }
      }
    }
