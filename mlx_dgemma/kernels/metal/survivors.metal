// The tokens of each row whose probability reaches a threshold, in vocabulary order, one threadgroup
// per row. Template: T logits, E embedding dtype (tempered logits are rounded to it), TG threads,
// CAPACITY places per row.
//: body
    constexpr uint NSG = TG / 32;
    constexpr uint RUN = 8;  // neighbouring columns per thread, so that order is kept by prefix sums
    const uint row = threadgroup_position_in_grid.y;
    const uint lid = thread_index_in_threadgroup;
    const uint lane = thread_index_in_simdgroup;
    const uint sg = simdgroup_index_in_threadgroup;
    const uint V = logits_shape[1];
    const ulong base = static_cast<ulong>(row) * V;
    const ulong place0 = static_cast<ulong>(row) * CAPACITY;
    const float softcap = settings[0];
    const float threshold = settings[1];
    const float divisor = temperature[row];
    const float shift = log_z[row];

    threadgroup uint group_count[NSG];
    threadgroup float group_total[NSG];
    threadgroup float group_kept[NSG];

    uint written = 0;
    float total = 0.0f;
    float kept = 0.0f;
    for (uint start = 0; start < V; start += TG * RUN) {
      float p[RUN];
      uint mine = 0;
      #pragma clang loop unroll(full)
      for (uint j = 0; j < RUN; j++) {
        const uint i = start + lid * RUN + j;
        p[j] = 0.0f;
        if (i < V) {
          const float raw = static_cast<float>(logits[base + i]);
          const float t = softcap * metal::precise::tanh(raw / softcap) / divisor;
          p[j] = metal::exp(static_cast<float>(static_cast<E>(t)) - shift);
          total += p[j];
          mine += p[j] >= threshold && p[j] > 0.0f ? 1u : 0u;
        }
      }
      const uint before_lane = simd_prefix_exclusive_sum(mine);
      const uint in_group = simd_sum(mine);
      if (lane == 0) {
        group_count[sg] = in_group;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      uint place = written + before_lane;
      for (uint g = 0; g < NSG; g++) {
        place += g < sg ? group_count[g] : 0u;
        written += group_count[g];
      }
      if (mine > 0) {
        #pragma clang loop unroll(full)
        for (uint j = 0; j < RUN; j++) {
          if (p[j] >= threshold && p[j] > 0.0f) {
            if (place < CAPACITY) {
              ids[place0 + place] = static_cast<int>(start + lid * RUN + j);
              weights[place0 + place] = p[j];
              kept += p[j];
            }
            place++;
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    const uint count = metal::min(written, static_cast<uint>(CAPACITY));
    for (uint i = count + lid; i < CAPACITY; i += TG) {
      ids[place0 + i] = 0;
      weights[place0 + i] = 0.0f;
    }
    const float all_total = simd_sum(total);
    const float all_kept = simd_sum(kept);
    if (lane == 0) {
      group_total[sg] = all_total;
      group_kept[sg] = all_kept;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lid == 0) {
      float sum = 0.0f;
      float sum_kept = 0.0f;
      for (uint g = 0; g < NSG; g++) {
        sum += group_total[g];
        sum_kept += group_kept[g];
      }
      counts[row] = static_cast<int>(count);
      dropped[row] = 1.0f - sum_kept / sum;
    }
