// The weighted sum of the surviving tokens' embedding rows; zeros where a row has none. A thread owns
// one packed word of every row (4 or 8 columns), or 4 columns of a dense table, and every PARTS-th
// survivor; the parts meet in threadgroup memory.
// Template: T embedding dtype, BITS 0 (dense), 4 or 8, GROUP, PARTS.
//: body
    constexpr uint SPAN = BITS == 4 ? 8 : 4;  // columns per thread
    constexpr uint HELD = SPAN + 1;           // and the sum of the weights
    const uint H = w_shape[1] * (BITS == 0 ? 1 : SPAN);
    const uint lane = thread_position_in_threadgroup.x;
    const uint share = thread_position_in_threadgroup.y;
    const uint part = threadgroup_position_in_grid.x * 32 + lane;
    const uint row = threadgroup_position_in_grid.y;
    const uint column = part * SPAN;
    const ulong from = static_cast<ulong>(row) * ids_shape[1];
    const uint n = column < H ? static_cast<uint>(counts[row]) : 0u;

    threadgroup float held[PARTS * 32 * HELD];

    float sum[SPAN];
    #pragma clang loop unroll(full)
    for (uint j = 0; j < SPAN; j++) {
      sum[j] = 0.0f;
    }
    float total = 0.0f;
    for (uint s = share; s < n; s += PARTS) {
      const ulong id = static_cast<ulong>(ids[from + s]);
      const float p = static_cast<float>(static_cast<T>(weights[from + s]));
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
    threadgroup float* mine = held + (share * 32 + lane) * HELD;
    #pragma clang loop unroll(full)
    for (uint j = 0; j < SPAN; j++) {
      mine[j] = sum[j];
    }
    mine[SPAN] = total;
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const float scaled = static_cast<float>(factor[0]);
    for (uint j = share; j < SPAN; j += PARTS) {
      if (column + j < H) {
        float whole = 0.0f;
        float weight = 0.0f;
        for (uint g = 0; g < PARTS; g++) {
          whole += held[(g * 32 + lane) * HELD + j];
          weight += held[(g * 32 + lane) * HELD + SPAN];
        }
        const T mean = static_cast<T>(weight > 0.0f ? whole / weight : 0.0f);
        y[static_cast<ulong>(row) * H + column + j] =
            static_cast<T>(static_cast<float>(mean) * scaled);
      }
    }
