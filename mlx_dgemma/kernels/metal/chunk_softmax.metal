// Softmax of one chunk of attention scores, a threadgroup per query row: weights, maximum, and the
// sum that the weights were divided by. Hidden keys weigh nothing; a row that sees no key of the
// chunk has the lowest maximum and a sum of zero, so that merging forgets it.
// Template: T scores and weights, TG threads, PER scores per thread, HAS_MASK.

constant constexpr float LOWEST = -3.0e38f;
//: body
    const uint lid = thread_index_in_threadgroup;
    const uint lane = thread_index_in_simdgroup;
    const uint sg = simdgroup_index_in_threadgroup;
    const uint row = threadgroup_position_in_grid.y;
    const uint S = scores_shape[2];
    const ulong from = static_cast<ulong>(row) * S;
    // Rows repeat every `queries`; the mask has one line per query.
    const ulong line = static_cast<ulong>(row % static_cast<uint>(queries[0])) * S;

    threadgroup float group_max[TG / 32];
    threadgroup float group_sum[TG / 32];

    float held[PER];
    float top = LOWEST;
    #pragma clang loop unroll(full)
    for (uint j = 0; j < PER; j++) {
      const uint i = j * TG + lid;
      held[j] = LOWEST;
      if (i < S) {
        const bool visible = HAS_MASK ? mask[line + i] : true;
        if (visible) {
          held[j] = static_cast<float>(scores[from + i]);
        }
      }
      top = metal::max(top, held[j]);
    }
    const float simd_top = simd_max(top);
    if (lane == 0) {
      group_max[sg] = simd_top;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float highest = group_max[0];
    for (uint g = 1; g < TG / 32; g++) {
      highest = metal::max(highest, group_max[g]);
    }

    float sum = 0.0f;
    #pragma clang loop unroll(full)
    for (uint j = 0; j < PER; j++) {
      held[j] = held[j] == LOWEST ? 0.0f : metal::precise::exp(held[j] - highest);
      sum += held[j];
    }
    const float simd_total = simd_sum(sum);
    if (lane == 0) {
      group_sum[sg] = simd_total;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float whole = group_sum[0];
    for (uint g = 1; g < TG / 32; g++) {
      whole += group_sum[g];
    }
    const float factor = whole > 0.0f ? 1.0f / whole : 0.0f;
    #pragma clang loop unroll(full)
    for (uint j = 0; j < PER; j++) {
      const uint i = j * TG + lid;
      if (i < S) {
        weights[from + i] = static_cast<T>(held[j] * factor);
      }
    }
    if (lid == 0) {
      maximum[row] = highest;
      total[row] = whole;
    }
