// One threadgroup per canvas, one thread per position. See accept.py for what is computed.
// Template: TG threads, at least one per position, HAS_PREVIOUS, HAS_PINNED.

constant constexpr float LAST = 3.0e38f;  // sorts behind every real entropy
//: body
    constexpr uint NSG = TG / 32;
    const uint C = entropy_shape[1];
    const uint b = threadgroup_position_in_grid.y;
    const uint i = thread_index_in_threadgroup;
    const uint lane = thread_index_in_simdgroup;
    const uint sg = simdgroup_index_in_threadgroup;
    const uint at = b * C + metal::min(i, C - 1);

    threadgroup float usable[TG];
    threadgroup float ascending[TG];
    threadgroup uint within[TG];
    threadgroup float sums[NSG];
    threadgroup uint counts[NSG];
    threadgroup uint equals[NSG];
    threadgroup uint finites[NSG];

    const bool inside = i < C;
    bool held = false;
    if (HAS_PINNED) {
      held = pinned[at] != 0;
    }
    const float own = entropy[at];
    const bool is_finite = metal::isfinite(own);
    const bool eligible = inside && !held && is_finite;
    usable[i] = eligible ? own : LAST;
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // 1. The place of each entropy in ascending order, the lowest index first among equals.
    const float value = usable[i];
    uint rank = 0;
    for (uint j = 0; j < TG; j++) {
      const float other = usable[j];
      rank += (other < value || (other == value && j < i)) ? 1u : 0u;
    }
    ascending[rank] = value;
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // 2. The running sum, one addition after the other as the definition has it.
    if (i == 0) {
      const float limit = bound[0];
      float running = 0.0f;
      for (uint j = 0; j < C; j++) {
        const float next = ascending[j];
        running += next;
        within[j] = running - next <= limit ? 1u : 0u;
      }
    }

    // 3. What the host reads, gathered per SIMD-group.
    const bool free_here = inside && !held;
    bool same = HAS_PREVIOUS;
    if (HAS_PREVIOUS) {
      same = !free_here || draft[at] == previous[at];
    }
    const float group_sum = simd_sum(free_here ? own : 0.0f);
    const uint group_count = simd_sum(free_here ? 1u : 0u);
    const uint group_equal = simd_min(same ? 1u : 0u);
    const uint group_finite = simd_min(free_here && !is_finite ? 0u : 1u);
    if (lane == 0) {
      sums[sg] = group_sum;
      counts[sg] = group_count;
      equals[sg] = group_equal;
      finites[sg] = group_finite;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const bool take = eligible && within[metal::min(rank, C - 1)] != 0;
    if (inside) {
      accepted[at] = take;
      next_canvas[at] = held ? canvas[at] : take ? sample[at] : fresh[at];
    }
    if (i == 0) {
      float sum = 0.0f;
      uint count = 0;
      uint equal = 1;
      uint finite = 1;
      for (uint g = 0; g < NSG; g++) {
        sum += sums[g];
        count += counts[g];
        equal &= equals[g];
        finite &= finites[g];
      }
      status[b * 3] = equal != 0 ? 1.0f : 0.0f;
      status[b * 3 + 1] = sum / static_cast<float>(metal::max(count, 1u));
      status[b * 3 + 2] = finite != 0 ? 1.0f : 0.0f;
    }
