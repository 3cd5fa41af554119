// Counting sort of (token, choice) pairs by expert, in the order of pairs inside an expert: one
// threadgroup, one thread per expert. Template: PAIRS at most, TG threads (at least one per expert).
//: body
    constexpr uint NSG = TG / 32;
    const uint lid = thread_index_in_threadgroup;
    const uint lane = thread_index_in_simdgroup;
    const uint sg = simdgroup_index_in_threadgroup;
    const uint n = pairs_shape[0];
    const uint count = per_expert_shape[0];

    threadgroup ushort choice[PAIRS];
    threadgroup uint group_count[NSG];

    for (uint i = lid; i < n; i += TG) {
      choice[i] = static_cast<ushort>(pairs[i]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint mine = 0;
    for (uint i = 0; i < n; i++) {
      mine += choice[i] == lid ? 1u : 0u;
    }
    uint place = simd_prefix_exclusive_sum(mine);
    const uint in_group = simd_sum(mine);
    if (lane == 0) {
      group_count[sg] = in_group;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint g = 0; g < sg; g++) {
      place += group_count[g];
    }
    if (lid < count) {
      offsets[lid] = static_cast<int>(place);
      if (lid == count - 1) {
        offsets[count] = static_cast<int>(place + mine);
      }
    }
    for (uint i = 0; i < n; i++) {
      if (choice[i] == lid) {
        order[place] = static_cast<int>(i);
        places[i] = static_cast<int>(place);
        place++;
      }
    }
