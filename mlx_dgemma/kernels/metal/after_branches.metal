// The residual stream after a layer's two branches, a threadgroup per row:
// (r + norm(norm(dense) + norm(experts))) * scalar. Each step is rounded to the stream's dtype R.
// Template: R, T activations, TG threads, PER columns per thread.

METAL_FUNC float row_sum(float value, threadgroup float* parts, uint lane, uint sg, uint groups) {
  const float together = simd_sum(value);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    parts[sg] = together;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float whole = 0.0f;
  for (uint g = 0; g < groups; g++) {
    whole += parts[g];
  }
  return whole;
}
//: body
    const uint lid = thread_index_in_threadgroup;
    const uint lane = thread_index_in_simdgroup;
    const uint sg = simdgroup_index_in_threadgroup;
    const uint H = residual_shape[1];
    const ulong from = static_cast<ulong>(threadgroup_position_in_grid.y) * H;
    const float width = static_cast<float>(H);
    const float eps = settings[0];
    const float branch_eps = settings[1];

    threadgroup float parts[TG / 32];

    float one[PER];
    float two[PER];
    float squares_one = 0.0f;
    float squares_two = 0.0f;
    #pragma clang loop unroll(full)
    for (uint j = 0; j < PER; j++) {
      const uint i = j * TG + lid;
      one[j] = i < H ? static_cast<float>(static_cast<R>(dense[from + i])) : 0.0f;
      two[j] = i < H ? static_cast<float>(static_cast<R>(experts[from + i])) : 0.0f;
      squares_one += one[j] * one[j];
      squares_two += two[j] * two[j];
    }
    const float mean_one = row_sum(squares_one, parts, lane, sg, TG / 32) / width;
    const float mean_two = row_sum(squares_two, parts, lane, sg, TG / 32) / width;
    const float factor_one = metal::precise::rsqrt(mean_one + branch_eps);
    const float factor_two = metal::precise::rsqrt(mean_two + branch_eps);
    float squares = 0.0f;
    #pragma clang loop unroll(full)
    for (uint j = 0; j < PER; j++) {
      const uint i = j * TG + lid;
      if (i < H) {
        const float left = static_cast<float>(
            static_cast<R>(static_cast<float>(w_dense[i]) * one[j] * factor_one));
        const float right = static_cast<float>(
            static_cast<R>(static_cast<float>(w_experts[i]) * two[j] * factor_two));
        one[j] = static_cast<float>(static_cast<R>(left + right));
        squares += one[j] * one[j];
      }
    }
    const float mean = row_sum(squares, parts, lane, sg, TG / 32) / width;
    const float factor = metal::precise::rsqrt(mean + eps);
    const float multiplier = static_cast<float>(scalar[0]);
    #pragma clang loop unroll(full)
    for (uint j = 0; j < PER; j++) {
      const uint i = j * TG + lid;
      if (i < H) {
        const float normed = static_cast<float>(
            static_cast<R>(static_cast<float>(w_both[i]) * one[j] * factor));
        const float sum = static_cast<float>(
            static_cast<R>(static_cast<float>(residual[from + i]) + normed));
        y[from + i] = static_cast<R>(sum * multiplier);
      }
    }
