// The top scores of each token, the lowest index first on ties, and their softmax: one SIMD-group
// per token. Template: T scores, EXPERTS, TOP_K.
//: body
    constexpr uint PER_LANE = (EXPERTS + 31) / 32;
    const uint lane = thread_index_in_simdgroup;
    const uint token = threadgroup_position_in_grid.y;

    float value[PER_LANE];
    uint open = 0;  // one bit per score of this lane that is not taken yet
    #pragma clang loop unroll(full)
    for (uint j = 0; j < PER_LANE; j++) {
      const uint e = j * 32 + lane;
      value[j] = 0.0f;
      if (e < EXPERTS) {
        value[j] = static_cast<float>(scores[token * EXPERTS + e]);
        open |= 1u << j;
      }
    }
    float chosen[TOP_K];
    uint index[TOP_K];
    #pragma clang loop unroll(full)
    for (uint k = 0; k < TOP_K; k++) {
      float best = -INFINITY;
      uint where = 0xffffffffu;
      #pragma clang loop unroll(full)
      for (uint j = 0; j < PER_LANE; j++) {
        if (((open >> j) & 1u) != 0 && (where == 0xffffffffu || value[j] > best)) {
          best = value[j];
          where = j * 32 + lane;
        }
      }
      const float top = simd_max(best);
      uint winner = simd_min(best == top ? where : 0xffffffffu);
      if (winner == 0xffffffffu) {
        winner = simd_min(where);  // NaN scores compare equal to nothing: take the lowest index
      }
      if (winner % 32 == lane) {
        open &= ~(1u << (winner / 32));
      }
      chosen[k] = top;
      index[k] = winner;
    }
    float sum = 0.0f;
    #pragma clang loop unroll(full)
    for (uint k = 0; k < TOP_K; k++) {
      sum += metal::exp(chosen[k] - chosen[0]);
    }
    if (lane == 0) {
      #pragma clang loop unroll(full)
      for (uint k = 0; k < TOP_K; k++) {
        experts[token * TOP_K + k] = static_cast<int>(index[k]);
        weights[token * TOP_K + k] =
            metal::exp(chosen[k] - chosen[0]) / sum * static_cast<float>(per_expert[index[k]]);
      }
    }
