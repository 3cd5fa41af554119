// The residual stream after attention and what three readers take of it, a threadgroup per row:
// r = x + norm(mixed), then norm(r) with two weights, and norm(r) * router * hidden^-0.5.
// Each step is rounded to the stream's dtype R. Template: R, T activations, TG threads, PER columns
// per thread.

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
    const uint H = x_shape[1];
    const ulong from = static_cast<ulong>(threadgroup_position_in_grid.y) * H;
    const float width = static_cast<float>(H);

    threadgroup float parts[TG / 32];

    float held[PER];
    float squares = 0.0f;
    #pragma clang loop unroll(full)
    for (uint j = 0; j < PER; j++) {
      const uint i = j * TG + lid;
      held[j] = i < H ? static_cast<float>(static_cast<R>(mixed[from + i])) : 0.0f;
      squares += held[j] * held[j];
    }
    const float mean = row_sum(squares, parts, lane, sg, TG / 32) / width;
    const float factor = metal::precise::rsqrt(mean + settings[0]);
    squares = 0.0f;
    #pragma clang loop unroll(full)
    for (uint j = 0; j < PER; j++) {
      const uint i = j * TG + lid;
      if (i < H) {
        const float normed = static_cast<float>(
            static_cast<R>(static_cast<float>(attention[i]) * held[j] * factor));
        const R sum = static_cast<R>(static_cast<float>(x[from + i]) + normed);
        residual[from + i] = sum;
        held[j] = static_cast<float>(sum);
        squares += held[j] * held[j];
      }
    }
    const float own = row_sum(squares, parts, lane, sg, TG / 32) / width;
    const float scale = metal::precise::rsqrt(own + settings[0]);
    #pragma clang loop unroll(full)
    for (uint j = 0; j < PER; j++) {
      const uint i = j * TG + lid;
      if (i < H) {
        const float normed = held[j] * scale;
        const R to_dense = static_cast<R>(static_cast<float>(dense[i]) * normed);
        const R to_experts = static_cast<R>(static_cast<float>(experts[i]) * normed);
        const float plain = static_cast<float>(static_cast<R>(normed));
        const float scaled = static_cast<float>(
            static_cast<R>(plain * static_cast<float>(router[i])));
        const float root = static_cast<float>(static_cast<R>(settings[1]));
        dense_input[from + i] = static_cast<T>(static_cast<float>(to_dense));
        experts_input[from + i] = static_cast<T>(static_cast<float>(to_experts));
        router_input[from + i] =
            static_cast<T>(static_cast<float>(static_cast<R>(scaled * root)));
      }
    }
